"""Several budgets on one wrapped model: python examples/qwen2_5_vl.py [MODEL] [PICTURE]"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune

name = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"
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
).to(model.device)

tokenprune.wrap(model, "vflowopt", keep=0.5)
for keep in (1.0, 0.5, 0.25, 0.125):
    with tokenprune.override(model, keep=keep):
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        report = tokenprune.report(model)
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(
        f"{report.retention_average:6.1%} of {report.tokens} tokens, KV {report.kv_used / 1e6:.1f} MB: {said}"
    )
tokenprune.unwrap(model)
