"""A video, at least two tokens of every frame: python examples/video.py [MODEL] [FILE.gif]"""

import sys

import numpy as np
from PIL import Image, ImageSequence
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune

name = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name)

if len(sys.argv) > 2:  # a file with frames that Pillow reads; for others, decode them as you like
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(sys.argv[2]))]
else:  # a bright square that moves
    frames = []
    for i in range(8):
        frame = Image.new("RGB", (224, 168), (40, 60, 90))
        frame.paste((250, 220, 60), (20 * i, 60, 20 * i + 40, 100))
        frames.append(frame)

content = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
videos = [np.stack([np.asarray(frame) for frame in frames])]
inputs = processor(text=[prompt], videos=videos, return_tensors="pt").to(model.device)

with tokenprune.pruned(model, "importance", keep=0.25, layer=0, frame_floor=2):
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    report = tokenprune.report(model)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(report)
report.draw([frames])[0].save("kept.png")
