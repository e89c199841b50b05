#!/usr/bin/env bash
# What a suggested slice is worth on ACDC: CMEMS from the slices that `suggest` ranks first, and from random ones.
#
#   docs/suggestion_worth.sh SPLITS OUT
#
# SPLITS, OUT  as for docs/acdc_small.sh, which has to run first and whose data and settings are used
#
# `suggest` sees the training scans alone. Random slices are drawn among the training slices that show all three classes.
set -euo pipefail
splits=$(realpath "${1:?usage: suggestion_worth.sh SPLITS OUT}")
out=$(realpath "${2:?usage: suggestion_worth.sh SPLITS OUT}")
export nnUNet_preprocessed=$out/preprocessed OMP_NUM_THREADS=1 nnUNet_def_n_proc=1
configuration=2d_small

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
slices = {f"suggested_{rank}": (case, int(z)) for rank, case, z in re.findall(r"^(\d+)\. (\S+), slice (\d+)", text, re.M)}
shown = []
for case in sorted(json.load(open(splits))[0]["train"]):
    label = sitk.GetArrayViewFromImage(sitk.ReadImage(f"{out}/suggest/Dataset027_ACDC/labelsTr/{case}.nii.gz"))
    shown += [(case, z) for z in range(len(label)) if all((label[z] == k).any() for k in (1, 2, 3))]
random.seed(0)
slices.update({f"random_{i}": random.choice(shown) for i in (1, 2)})
for name, (case, z) in slices.items():
    config = {"exemplar": [{"case": case, "slice": z}], "num_epochs": 5, "iterations_per_epoch": 100, "val_iterations_per_epoch": 5,
              "checkpoint_every": 1, "seed": 1}
    json.dump(config, open(f"{out}/{name}.json", "w"))
    print(name, case, z)
PYTHON

train() {
    python -c "import multiprocessing; multiprocessing.cpu_count = lambda: 1
from nnunetv2.run.run_training import run_training_entry; run_training_entry()" "$@"
}

run() {
    export nnUNet_results=$out/$1 nnUNet_cmems_config=$out/$1.json
    [ -f "$nnUNet_results/Dataset027_ACDC/nnUNetTrainerCMEMS__nnUNetPlans__$configuration/fold_0/validation/summary.json" ] && return
    mkdir -p "$nnUNet_results"
    nnUNet_n_proc_DA=0 train 27 $configuration 0 -tr nnUNetTrainerCMEMS -device cpu --c >"$nnUNet_results/log" 2>&1 ||
        echo "FAILED: see $nnUNet_results/log"
}
export -f run train
export configuration out
printf '%s\n' suggested_1 random_1 suggested_2 random_2 | xargs -P 2 -I{} bash -c 'run {}'

for kind in suggested random; do
    echo "$kind"
    python -m nnunetv2_cmems.study.table -d 27 -c $configuration -r "$out/$kind"_?
done
