# vLLM with images pruned before the LLM. Not built by the tests: they have no Docker and no GPU.
#   docker build -t tokenprune .
#   docker run --gpus all -p 8000:8000 tokenprune --model llava-hf/llava-1.5-7b-hf \
#     --additional-config '{"tokenprune": {"method": "vflowopt", "keep": 0.25, "recycling": "none"}}'
FROM vllm/vllm-openai:v0.32.0
COPY . /tokenprune
RUN pip install --no-cache-dir --no-deps /tokenprune
