#!/usr/bin/env bash
# The benchmarks of docs/results.md, at a size that a CPU can train: prepares the data, trains, prints the tables.
#
#   docs/benchmarks.sh acdc|headneck|hippocampus OUT [SPLITS] [-- OPTION ...]
#
# OUT      folder for the preprocessed data and the results
# SPLITS   for acdc: splits_final.json of the patient-wise split (70 patients to train, 10 to validate)
# OPTION   for nnUNetv2_cmems benchmark, instead of the trainers below, such as --trainers uniMatch --epochs 10 or --study tau
#
# nnUNet_raw must hold Dataset027_ACDC, Dataset040_HeadNeckCT or Dataset004_Hippocampus. Two runs at a time with one thread each. Finished runs are
# skipped, so that an interrupted call can be repeated.
set -euo pipefail
usage="usage: benchmarks.sh acdc|headneck|hippocampus OUT [SPLITS] [-- OPTION ...]"
what=${1:?$usage}
mkdir -p "${2:?$usage}"
out=$(realpath "$2")
shift 2
export nnUNet_preprocessed=$out/preprocessed nnUNet_results=$out/results
export OMP_NUM_THREADS=1 nnUNet_def_n_proc=1
mkdir -p "$nnUNet_results"
base=2d

# id, folder, options of the small configuration, splits file if there is one
prepare() {
    configuration=${base}_small
    local data=$nnUNet_preprocessed/$2
    [ -d "$data/nnUNetPlans_$configuration" ] && return
    nnUNetv2_extract_fingerprint -d "$1" -np 2
    nnUNetv2_plan_experiment -d "$1"
    [ -z "${4:-}" ] || cp "$4" "$data/splits_final.json"
    python -m nnunetv2_cmems.study.small_configuration -d "$1" -c $base --name $configuration $3
    nnUNetv2_preprocess -d "$1" -c $configuration -np 2
}

case $what in
acdc)
    prepare 27 Dataset027_ACDC "" "$(realpath "${1:?$usage}")"
    shift
    id=27
    # One slice each, of three patients; the first one was the automatic choice when most of the tables were made.
    echo '[[{"case": "patient053_frame01", "slice": 3}], [{"case": "patient026_frame01", "slice": 4}],
           [{"case": "patient018_frame10", "slice": 3}]]' >"$out/exemplars.json"
    trained=(--trainers CMEMS exemplarOnly meanTeacher cps fixMatch uniMatch crossTeaching imageOnly featureOnly noSynthesis paper allLabels)
    ;;
headneck)
    prepare 40 Dataset040_HeadNeckCT "--patch 96 128 --spacing 3.90625 3.90625"
    id=40
    # One volume, all of its slices.
    echo '[[{"case": "pt109"}]]' >"$out/exemplars.json"
    trained=(--trainers CMEMS exemplarOnly uniMatch allLabels --study competence)
    ;;
hippocampus)
    base=3d_fullres
    prepare 4 Dataset004_Hippocampus "--patch 32 48 32 --spacing 1 1 1 --features 8 16 32 64 --batch 8"
    id=4
    echo '[[{"case": "hippocampus_263"}]]' >"$out/exemplars.json"
    trained=(--trainers CMEMS exemplarOnly allLabels)
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
[ "${1:-}" != -- ] || shift
[ $# -gt 0 ] || set -- "${trained[@]}" --by-patient

echo '{"val_iterations_per_epoch": 5}' >"$out/config.json"
nnUNet_n_proc_DA=0 nnUNetv2_cmems benchmark -d $id -c $configuration -f 0 -device cpu --jobs 2 --threads 1 \
    --epochs 5 --iterations 100 --exemplars "$out/exemplars.json" --seeds 1 --config "$out/config.json" -o "$out/benchmark" "$@"
[ ! -f "$out/benchmark/benchmark.json" ] || nnUNetv2_cmems report "$out/benchmark"
