"""Slot-based video: does a second key-value stream help, at which capacity, at which cost?

    python -m train --config configs/video_slots.py                     # standard attention: global pairwise
    python -m train --config configs/video_slots.py:local               # local pairwise, among a frame's tokens
    python -m train --config configs/video_slots.py:dual_kv             # two key-value streams
    python -m train --config configs/video_slots.py:dual_kv,smoke       # a minute, to see that it runs
    python -m train --config configs/video_slots.py:paper               # the source's sizes, on accelerators

The default run takes 4 minutes on two cores; test MSE with seed 0: standard 0.0222, dual_kv 0.0203 (the mean
training frame 0.0397, each frame's mean colour 0.0369).

A frame passes through a few slots and is decoded from them. By default slots attend to tokens as in the source;
Slot Attention that is carried from frame to frame and predicts the next ones (SAVi) is

    python -m train --config configs/video_slots.py --config.model.competition=slots \\
        --config.model.initial=sampled --config.model.recurrent=True

Data: procedural clips of textured sprites with ground-truth masks. Real video with `--config.task.source=`: a
folder of video files, a folder or hub id of Parquet files such as OpenVid-1k, or `realdata`, the four clips of
that extra.
"""

from train.config import experiment

DEFAULT = {
    "comparability": "procedural video at a small size; the source's numbers are of latents of another data set",
    "task": {
        "name": "video",
        "source": "sprites",
        "column": "",  # of Parquet files that holds the video; empty: the one that looks like it
        "num_frames": 6,
        "height": 32,
        "width": 32,
        "predict_frames": 2,  # of a recurrent model, the last ones of a clip, in evaluation
        "prediction_weight": 1.0,  # of a recurrent model's error in the next frame, in training
        "sprites": {"num_train": 2_000, "num_val": 100, "num_test": 200, "min_objects": 2, "max_objects": 5},
        # Of real video: every second frame; shares of the videos in train, val and test, dealt by this seed.
        "clips": {"stride": 2, "max_clips_per_video": 16, "fractions": (0.9, 0.05, 0.05), "seed": 0},
    },
    "model": {
        "patch_size": 4,
        "dim": 64,
        "num_heads": 4,
        "num_slots": 6,
        "num_layers": 2,
        "token_layers": 1,  # over a frame's tokens: there any mechanism fits, which elsewhere must take a context
        "token_span": "frame",
        "competition": "tokens",
        "num_iterations": 3,
        "initial": "fixed",
        "noise": 0.0,
        "recurrent": False,
        "history": 1,
        "time_rope": False,
        "drop_path": 0.0,
    },
    "batch_size": 16,
    "eval_batch_size": 20,
    "steps": 1_500,
    "eval_every": 500,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "a few steps on a few clips: shows that everything runs, nothing else",
    "task": {"sprites": {"num_train": 64, "num_val": 8, "num_test": 8}},
    "model": {"dim": 32, "num_layers": 1},
    "batch_size": 8,
    "eval_batch_size": 8,
    "steps": 20,
    "eval_every": 10,
}

# The source's configuration: 8 slots of width 256, a grid of 40 x 22 tokens, 3 blocks, AdamW 1e-4 with 10 %
# warm-up and a cosine, batch 1, 160 epochs of its 950 training videos. Its tokens are latents of a pretrained
# video encoder, here they are patches of 16 pixels.
PAPER = {
    "comparability": "the source's sizes on pixels instead of a pretrained encoder's latents",
    "task": {
        "source": "ACIDE/OpenVid-1k",
        "num_frames": 16,
        "height": 352,
        "width": 640,
        "clips": {"max_clips_per_video": 1, "fractions": (0.95, 0.025, 0.025)},
    },
    "model": {
        "patch_size": 16,
        "dim": 256,
        "num_heads": 4,
        "num_slots": 8,
        "num_layers": 3,
        "token_layers": 0,
        "noise": 0.2,
        "drop_path": 0.01,
    },
    "batch_size": 1,
    "eval_batch_size": 1,
    "steps": 152_000,
    "eval_every": 4_750,
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 15_200},
}


def get_config(variant: str = ""):
    return experiment("video_slots", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
