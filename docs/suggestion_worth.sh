#!/usr/bin/env bash
# What a suggested slice is worth on ACDC: CMEMS from the slices that `suggest` ranks first, and from random ones.
#
#   docs/suggestion_worth.sh SPLITS OUT
#
# SPLITS, OUT  as for docs/benchmarks.sh acdc, which has to run first and whose data and settings are used
#
# `suggest` sees the training scans alone. Random slices are drawn among the training slices that show all three classes.
# Exemplars 1 and 2 are the suggestions, 3 and 4 are random.
set -euo pipefail
splits=$(realpath "${1:?usage: suggestion_worth.sh SPLITS OUT}")
out=$(realpath "${2:?usage: suggestion_worth.sh SPLITS OUT}")
export nnUNet_preprocessed=$out/preprocessed OMP_NUM_THREADS=1 nnUNet_def_n_proc=1

source=$nnUNet_raw
export nnUNet_raw=$out/suggest
mkdir -p "$nnUNet_raw"
ln -sfn "$source/Dataset027_ACDC" "$nnUNet_raw/Dataset027_ACDC"
[ -d "$nnUNet_raw/Dataset227_ACDCWithheld" ] || python -m nnunetv2_cmems.study.withhold -d 27 --new 227 --splits "$splits"
[ -f "$out/suggestions/suggestions.txt" ] || nnUNetv2_cmems suggest -d 227 -n 2 -o "$out/suggestions"

python - "$splits" "$out" <<'PYTHON'
import json, random, re, sys
import SimpleITK as sitk
sitk.ProcessObject.SetGlobalWarningDisplay(False)
splits, out = sys.argv[1:]
text = open(f"{out}/suggestions/suggestions.txt").read()
slices = [(case, int(z)) for rank, case, z in re.findall(r"^(\d+)\. (\S+), slice (\d+)", text, re.M)]
shown = []
for case in sorted(json.load(open(splits))[0]["train"]):
    label = sitk.GetArrayViewFromImage(sitk.ReadImage(f"{out}/suggest/Dataset027_ACDC/labelsTr/{case}.nii.gz"))
    shown += [(case, z) for z in range(len(label)) if all((label[z] == k).any() for k in (1, 2, 3))]
random.seed(0)
slices += [random.choice(shown) for _ in range(2)]
json.dump([[{"case": case, "slice": z}] for case, z in slices], open(f"{out}/slices.json", "w"))
print(slices)
PYTHON

# What the defaults were when docs/results.md was measured.
echo '{"val_iterations_per_epoch": 5, "architecture": "plans", "competence": false, "scan_labels": {"at": []}}' >"$out/before.json"
nnUNet_n_proc_DA=0 nnUNetv2_cmems benchmark -d 27 -c 2d_small -f 0 -device cpu --jobs 2 --threads 1 --trainers CMEMS \
    --epochs 5 --iterations 100 --exemplars "$out/slices.json" --seeds 1 --config "$out/before.json" -o "$out/suggested"
python -c "import pandas, sys
print((100 * pandas.read_csv(sys.argv[1]).pivot_table('dice', 'exemplar', 'label')).round(1))" "$out/suggested/tables/cases.csv"
