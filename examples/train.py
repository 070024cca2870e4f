"""LoRA with the Trainer, through pruned prompts and gradient checkpoints: python examples/train.py [MODEL]"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import tokenprune

name = sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-1.5-7b-hf"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)

# Uniform: what is kept must not depend on weights that change. A method that scores works, too.
tokenprune.wrap(model, "uniform", keep=0.5, layer=0)
targets = r".*language_model.*\.(q_proj|v_proj)"
model = get_peft_model(model, LoraConfig(target_modules=targets, r=8))

samples = [{"path": str(path), "answer": "a picture"} for path in sorted(Path("pictures").glob("*.jpg"))[:4]]


def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    conversations = []
    for sample in batch:
        asked = [
            {"type": "image", "image": Image.open(sample["path"])},
            {"type": "text", "text": "What is this?"},
        ]
        said = [{"type": "text", "text": sample["answer"]}]
        conversations.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.image_token_id] = -100  # and, for a real run, the question
    labels[inputs["attention_mask"] == 0] = -100
    return {**inputs, "labels": labels}


arguments = TrainingArguments(
    output_dir="trained",
    max_steps=2,
    per_device_train_batch_size=2,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    remove_unused_columns=False,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate)
print(trainer.train().training_loss)
print(tokenprune.report(model, total=True))
tokenprune.unwrap(model)
model.save_pretrained("trained")
