#!/usr/bin/env bash
# Trains every method of docs/results.md on ACDC at a size that a CPU can train, and prints the table.
#
#   docs/acdc_small.sh SPLITS OUT [TRAINER ...]
#
# SPLITS   splits_final.json of the patient-wise split (70 patients to train, 10 to validate)
# OUT      folder for the preprocessed data and the results
# TRAINER  only these, without the prefix nnUNetTrainerCMEMS: "" (the whole method), _paper, _exemplarOnly, ...
#
# nnUNet_raw must hold Dataset027_ACDC. Two runs at a time with one thread each; about an hour on two cores.
# Finished runs are skipped, so that an interrupted call can be repeated.
set -euo pipefail
splits=$(realpath "${1:?usage: acdc_small.sh SPLITS OUT}")
mkdir -p "${2:?usage: acdc_small.sh SPLITS OUT}"
out=$(realpath "$2")
shift 2
here=$(cd "$(dirname "$0")" && pwd)
export nnUNet_preprocessed=$out/preprocessed nnUNet_results=$out/results
export OMP_NUM_THREADS=1 nnUNet_def_n_proc=1
configuration=2d_small

data=$nnUNet_preprocessed/Dataset027_ACDC
if [ ! -d "$data/nnUNetPlans_$configuration" ]; then
    nnUNetv2_extract_fingerprint -d 27
    nnUNetv2_plan_experiment -d 27
    cp "$splits" "$data/splits_final.json"
    python -m nnunetv2_cmems.study.small_configuration -d 27 --name $configuration
    nnUNetv2_preprocess -d 27 -c $configuration -np 2
fi

# Exemplars: the automatic choice, and two further ones of other patients.
exemplars=('"auto"' '[{"case": "patient026_frame01", "slice": 4}]' '[{"case": "patient018_frame10", "slice": 3}]')

# Epochs of 100 steps; methods that do fewer network passes a step get more epochs, so that all cost the same.
declare -A epochs=(
    [nnUNetTrainerCMEMS]=5
    [nnUNetTrainerCMEMS_paper]=5
    [nnUNetTrainerCMEMS_noSynthesis]=5
    [nnUNetTrainerCMEMS_imageOnly]=6
    [nnUNetTrainerCMEMS_featureOnly]=6
    [nnUNetTrainerCMEMS_exemplarOnly]=10
)

trainers=()
for suffix in "${@:-}" ; do trainers+=("nnUNetTrainerCMEMS$suffix"); done
if [ $# -eq 0 ]; then
    trainers=(nnUNetTrainerCMEMS nnUNetTrainerCMEMS_imageOnly nnUNetTrainerCMEMS_featureOnly nnUNetTrainerCMEMS_noSynthesis
        nnUNetTrainerCMEMS_paper nnUNetTrainerCMEMS_exemplarOnly)
fi

jobs_file=$out/jobs
: >"$jobs_file"
for number in 1 2 3; do
    for trainer in "${trainers[@]}"; do
        config=$out/exemplar_$number.$trainer.json
        echo "{\"exemplar\": ${exemplars[number - 1]}, \"num_epochs\": ${epochs[$trainer]}, \"iterations_per_epoch\": 100," \
            "\"val_iterations_per_epoch\": 5, \"checkpoint_every\": 1, \"seed\": $number}" >"$config"
        echo "$out/exemplar_$number $trainer $config" >>"$jobs_file"
    done
done
[ ${#trainers[@]} -lt 6 ] || echo "$out/every_label nnUNetTrainer_5epochs -" >>"$jobs_file"

# nnUNetv2_train -device cpu takes as many threads as there are cores; here it is to take one.
train() {
    python -c "import multiprocessing; multiprocessing.cpu_count = lambda: 1
from nnunetv2.run.run_training import run_training_entry; run_training_entry()" "$@"
}

run() {
    export nnUNet_results=$1 nnUNet_cmems_config=$3
    folder=$nnUNet_results/Dataset027_ACDC/$2__nnUNetPlans__$configuration/fold_0
    [ -f "$folder/validation/summary.json" ] && return
    mkdir -p "$1"
    echo "$(date +%T) $2 $(basename "$1")"
    SECONDS=0
    nnUNet_n_proc_DA=0 train 27 $configuration 0 -tr "$2" -device cpu --c >"$1/$2.log" 2>&1 || echo "FAILED: see $1/$2.log"
    echo "$(date +%T) $2 $(basename "$1") took $SECONDS s"
}
export -f run train
export configuration
xargs -P 2 -L 1 bash -c 'run "$0" "$1" "$2"' <"$jobs_file"

python -m nnunetv2_cmems.study.table -d 27 -c $configuration -r "$out"/exemplar_? --montage "$here/acdc_small.png" --trainers "${trainers[@]}"
[ ${#trainers[@]} -lt 6 ] || python -m nnunetv2_cmems.study.table -d 27 -c $configuration -r "$out/every_label"
