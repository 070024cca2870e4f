"""A ragged batch, tokens kept row by row: python examples/batch.py [MODEL] [PICTURE ...]"""

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune

name = sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-1.5-7b-hf"
paths = sys.argv[2:] or sorted(map(str, Path("pictures").glob("*.jpg")))[:4]
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name)
processor.tokenizer.padding_side = "left"  # generate() goes on at the right end

conversations = []
for number, path in enumerate(paths):
    question = "What is this?" if number % 2 else "Describe what you see on this picture in one sentence."
    content = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": question}]
    conversations.append([{"role": "user", "content": content}])
inputs = processor.apply_chat_template(
    conversations,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    padding=True,
).to(model.device, dtype=model.dtype)

with tokenprune.pruned(model, keep=0.25):
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    report = tokenprune.report(model)
said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for image in report.images:
    print(f"{paths[image.row]}: {image.kept[-1]} of {image.tokens} tokens left: {said[image.row]}")
