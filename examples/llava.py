"""One picture, one question, whole and pruned: python examples/llava.py [MODEL] [PICTURE]"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune

name = sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-1.5-7b-hf"
picture = Image.open(sys.argv[2] if len(sys.argv) > 2 else "photo.jpg")
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name)

content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=model.dtype)


def answer() -> str:
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("whole: ", answer())
with tokenprune.pruned(model, keep=0.25):
    print("pruned:", answer())
    report = tokenprune.report(model)
print(report)
report.draw([picture], processor=processor, stages=True)[0].save("kept.png")
