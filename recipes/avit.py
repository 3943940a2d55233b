"""A-ViT: let the tokens of a plain ViT or DeiT halt, and train it to halt early.

    python recipes/avit.py --model facebook/deit-tiny-patch16-224 --gate tiny --data photos/ --output runs/avit_tiny
    python recipes/avit.py --model facebook/deit-small-patch16-224 --gate small --learning-rate 3e-4 --batch-size 96 \\
        --data photos/ --output runs/avit_small

The defaults are those published for A-ViT-T on four GPUs: 100 epochs, 5 of them to warm up, learning rate 5e-4 for 512
images a step, ponder weight 5e-4, distribution weight 1e-3. A smaller `--target-depth` and a larger `--ponder-weight`
make the tokens halt earlier. A checkpoint whose first channel is small needs a gate that meets it: `--gate-scale 5
--gate-center 10`, say; `mean_token_depth` in the log tells. Any other option is one of `TrainingArguments`.
"""

import argparse
from pathlib import Path

from transformers import AutoImageProcessor, TrainingArguments

from lgvit_hf import AViT, AViTTrainer
from lgvit_hf.augmentation import Augmentation
from lgvit_hf.data import ProcessedImages, load_images, stack
from lgvit_hf.files import write_json
from lgvit_hf.recipe import others_as_arguments

HALTING = ("gate", "gate_scale", "gate_center", "ponder_weight", "distribution_weight", "target_depth")
TRAINING = {
    "num_train_epochs": 100,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "remove_unused_columns": False,
    "report_to": [],
}


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a plain ViT or DeiT")
    parser.add_argument("--data", required=True, help="digits, a folder of images, parquet files or a Hub id")
    parser.add_argument("--output", required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--gate", choices=("tiny", "small", "student"), help="a published scale and centre")
    for name in HALTING[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="of AViTConfig")
    parser.add_argument("--augment", choices=("random_resized", "pad", "none"), default="random_resized")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="for 512 images a step (default: 5e-4)")
    parser.add_argument("--batch-size", type=int, default=128, help="per process (default: 128)")
    parser.add_argument("--max-train-samples", type=int, help="train on that many random images only")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args()


def main():
    options, others = read_options()
    splits = load_images(options.data, seed=options.seed)
    labels = {"id2label": dict(enumerate(splits.label_names))}
    halting = {name: getattr(options, name) for name in HALTING if getattr(options, name) is not None}
    model = AViT.from_backbone(options.model, **labels, **halting)
    processor = AutoImageProcessor.from_pretrained(options.model)
    rows = splits.train
    if options.max_train_samples is not None:
        rows = rows.shuffle(seed=options.seed).select(range(options.max_train_samples))
    augment = None if options.augment == "none" else Augmentation(crop=options.augment)
    arguments = {**TRAINING, "output_dir": options.output, "seed": options.seed}
    arguments |= {f"per_device_{which}_batch_size": options.batch_size for which in ("train", "eval")}
    arguments |= others_as_arguments(others, list(vars(options)))
    args = TrainingArguments(**arguments)
    images_a_step = args.train_batch_size * args.world_size
    args.learning_rate = options.learning_rate * images_a_step / 512
    args.warmup_steps = round(0.05 * args.num_train_epochs * len(rows) / images_a_step)
    trainer = AViTTrainer(
        model,
        args,
        train_dataset=ProcessedImages(rows, processor, augment=augment, seed=options.seed),
        eval_dataset=ProcessedImages(splits.validation, processor),
        data_collator=stack,
    )
    trainer.train()
    figures = trainer.evaluate(ProcessedImages(splits.test, processor), metric_key_prefix="test")
    if trainer.is_world_process_zero():
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)
        write_json(Path(options.output) / "training.json", {"test": figures, "log": trainer.state.log_history})
        print(
            f"{figures['test_accuracy']:.1%} right, macro F1 {figures['test_macro_f1']:.3f}, tokens run "
            f"{figures['test_mean_token_depth']:.2f} of {model.config.num_hidden_layers} blocks"
        )


if __name__ == "__main__":
    main()
