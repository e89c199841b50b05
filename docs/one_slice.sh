#!/usr/bin/env bash
# The path of somebody who has scans and has painted a slice (or a few, or a volume), on four data sets whose other labels are withheld.
#
#   docs/one_slice.sh RAW SPLITS OUT
#
# RAW     folder with Dataset027_ACDC, Dataset040_HeadNeckCT and Dataset004_Hippocampus in nnU-Net's raw format
# SPLITS  splits_final.json of ACDC's patient-wise split (70 patients to train, 10 to examine)
# OUT     folder for everything that is made
#
# At a size that a CPU can train; two trainings at a time with one thread each. Finished steps are skipped.
set -euo pipefail
raw=$(realpath "${1:?usage: one_slice.sh RAW SPLITS OUT}")
splits=$(realpath "${2:?usage: one_slice.sh RAW SPLITS OUT}")
mkdir -p "${3:?usage: one_slice.sh RAW SPLITS OUT}"
out=$(realpath "$3")
export nnUNet_raw=$out/raw nnUNet_preprocessed=$out/preprocessed OMP_NUM_THREADS=1 nnUNet_def_n_proc=1
mkdir -p "$nnUNet_raw"
for data in Dataset027_ACDC Dataset040_HeadNeckCT Dataset004_Hippocampus; do ln -sfn "$raw/$data" "$nnUNet_raw/$data"; done

flat="--patch 128 128 --features 8 16 32 64 96 --batch 12"
deep="--patch 32 48 32 --spacing 1 1 1 --features 8 16 32 64 --batch 8"

# id, source, what is painted, the configuration of nnU-Net, what makes its small variant
prepare() {
    local id=$1 source=$2 exemplar=$3 base=$4 small=$5
    ls -d "$nnUNet_raw/Dataset$id"_* >/dev/null 2>&1 ||
        python -m nnunetv2_cmems.study.withhold -d "$source" --new "$id" --exemplar $exemplar $([ "$source" = 27 ] && echo --splits "$splits")
    nnUNetv2_cmems plan_and_preprocess -d "$id" -c "$base" -np 2 -npfp 2
    python -m nnunetv2_cmems.study.small_configuration -d "$id" -c "$base" --name "${base}_small" $small
    nnUNetv2_cmems plan_and_preprocess -d "$id" -c "${base}_small" -np 2 -npfp 2
}
prepare 127 27 patient053_frame01:3:z 2d "--patch 128 112 --spacing 2.75 2.75 --features 8 16 32 64 96 --batch 12"
prepare 140 40 pt109:26,36,42,48,75:z 2d "$flat --spacing 3.90625 3.90625"
prepare 104 4 hippocampus_263 3d_fullres "$deep"
prepare 105 4 hippocampus_263:15:z 3d_fullres "$deep"

# nnUNetv2_train -device cpu takes as many threads as there are cores; here it is to take one.
train() {
    python -c "import multiprocessing; multiprocessing.cpu_count = lambda: 1
from nnunetv2.run.run_training import run_training_entry; run_training_entry()" "$@"
}

# id, configuration, trainer, epochs of 100 steps: train, predict the scans of the examination, evaluate
run() {
    local data config
    data=$(basename "$(ls -d "$nnUNet_raw/Dataset$1"_*)")
    export nnUNet_results=$out/results nnUNet_cmems_config=$out/$1.$3.json
    config=$nnUNet_cmems_config
    local model=$nnUNet_results/$data/$3__nnUNetPlans__$2 predicted=$out/predicted/$1.$3
    [ -f "$predicted/summary.json" ] && return
    mkdir -p "$out/predicted"
    echo "{\"num_epochs\": $4, \"iterations_per_epoch\": 100, \"checkpoint_every\": 1, \"seed\": 1, $before}" >"$config"
    SECONDS=0
    echo "$(date +%T) $data $3"
    {
        nnUNet_n_proc_DA=0 train "$1" "$2" all -tr "$3" -device cpu --c
        echo "trained in $SECONDS s"
        OMP_NUM_THREADS=1 nnUNetv2_predict -d "$1" -c "$2" -f all -tr "$3" -i "$nnUNet_raw/$data/imagesTs" -o "$predicted" -device cpu -npp 1 -nps 1
        nnUNetv2_evaluate_folder "$nnUNet_raw/$data/labelsTs" "$predicted" -djfile "$model/dataset.json" -pfile "$model/plans.json" -np 1
    } >"$out/$1.$3.log" 2>&1 || { echo "FAILED: see $out/$1.$3.log" && return; }
    echo "$(date +%T) $data $3 took $SECONDS s"
}
export -f run train
# What the defaults were when docs/results.md was measured.
before='"architecture": "plans", "competence": false, "synthesis": {"complete_only": false}, "scan_labels": {"at": []}, "early_steps": 0'
export out before
xargs -P 2 -L 1 bash -c 'run "$0" "$1" "$2" "$3"' <<JOBS
127 2d_small nnUNetTrainerCMEMS 5
127 2d_small nnUNetTrainerCMEMS_exemplarOnly 10
140 2d_small nnUNetTrainerCMEMS 5
140 2d_small nnUNetTrainerCMEMS_exemplarOnly 10
104 3d_fullres_small nnUNetTrainerCMEMS 4
104 3d_fullres_small nnUNetTrainerCMEMS_exemplarOnly 8
105 3d_fullres_small nnUNetTrainerCMEMS 4
105 3d_fullres_small nnUNetTrainerCMEMS_exemplarOnly 8
JOBS

python -m nnunetv2_cmems.study.table --predictions "$out"/predicted/*
