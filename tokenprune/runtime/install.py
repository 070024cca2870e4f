"""The hooks of a wrapped model: put in once by `wrap`, the same for every method, and taken off by `unwrap`.

The runtime knows neither methods nor families: it asks the family where things are, gives the method what it needs,
and turns selections into shorter hidden states, masks, positions and caches. A file per place where hooks sit:
`call.py` (the model), `layers.py` (the text model and its layers), `taps.py` (what methods see).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.config import PruneConfig, decoder_shape
from tokenprune.errors import TokenPruneError
from tokenprune.models.base import Family
from tokenprune.runtime import compiled
from tokenprune.runtime.call import CallHooks
from tokenprune.runtime.current import (
    Calls,
    Override,
    begin_override,
    end_override,
    last_outcome,
    note_outcome,
    overrides_here,
)
from tokenprune.runtime.frame import Frame
from tokenprune.runtime.layer_masks import LayerMasks
from tokenprune.runtime.layers import LayerHooks
from tokenprune.runtime.outcome import Outcome
from tokenprune.runtime.taps import Taps
from tokenprune.runtime.vision import noting_sizes

Hook = Callable[..., Any]


class Runtime:
    """The hooks of one wrapped model.

    Args:
        model: the stock model.
        family: where its parts are.
        config: what to do in calls that no `override` says otherwise for.
    """

    def __init__(self, model: nn.Module, family: Family, config: PruneConfig) -> None:
        self.model, self.family, self.config = model, family, config
        self.layers = list(family.layers(model))
        self.text_config: Any = family.text_model(model).config
        self.shape = decoder_shape(model, family)
        self.masks = LayerMasks(self.text_config, family.attention(self.layers[0]))
        self.calls = Calls({})
        self.overrides: set[Override] = set()  # in force, in any thread or task
        self.gate = threading.RLock()  # between calls that begin and hooks that come and go
        self.installed = False
        self.latest: Outcome | None = None
        self.call, self.decoder, self.taps = CallHooks(self), LayerHooks(self), Taps(self)
        self._handles: list[RemovableHandle] = []
        self._shadows: list[tuple[nn.Module, str]] = []

    # -- life cycle -------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register the hooks; after an error none is left."""
        compiled.forget()
        try:
            self.call.install()
            self.decoder.install()
            self.taps.install()
            if self.family.sizes_ahead:
                self._note_sizes()
            self.taps.arm(self.config)
            self.installed = True
        except BaseException:
            self._remove()
            raise

    def remove(self) -> None:
        """Take the hooks off.

        Raises:
            TokenPruneError: a call is under way, or an override is in force in another thread or task; nothing has
                been changed.
        """
        with self.gate:
            if self.calls.are_running():
                raise TokenPruneError(
                    "a call of this model is under way (in another thread, or around this one); unwrap it afterwards"
                )
            own = overrides_here(self)
            if not self.overrides.issubset(own):
                raise TokenPruneError(
                    "an override of this model is in force in another thread or task; unwrap it after that has ended"
                )
            for override in own:
                end_override(override)
            self._remove()

    def _remove(self) -> None:
        compiled.forget()
        self.installed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, name in self._shadows:
            vars(module).pop(name, None)
        self._shadows.clear()
        self.taps.disarm()

    @contextmanager
    def overriding(self, config: PruneConfig) -> Iterator[None]:
        """Inside, this thread's or task's calls have these settings; blocks may end in any order.

        Raises:
            TokenPruneError: another thread has unwrapped the model since.
        """
        override = Override(self, config)
        with self.gate:
            if not self.installed:
                raise TokenPruneError("this model was unwrapped by another thread just now")
            self.taps.arm(config)  # what the method sees, where nobody needed it before
            self.overrides.add(override)
        begin_override(override)
        try:
            yield
        finally:
            end_override(override)
            with self.gate:
                self.overrides.discard(override)

    def _note_sizes(self) -> None:
        """Put a noting function before get_image_features and get_video_features, until the model is unwrapped."""
        base = self.family.base(self.model)
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(base, name) and name not in vars(base):
                setattr(base, name, noting_sizes(getattr(base, name), kind, self.family))
                self._shadows.append((base, name))

    def before(self, module: nn.Module, hook: Hook, quick: Hook | None = None) -> None:
        """Register `hook`, which stands in for `quick` where torch.compile runs; see `compiled.either`."""
        chosen = compiled.either(hook, quick)
        self._handles.append(module.register_forward_pre_hook(chosen, with_kwargs=True))

    def after(self, module: nn.Module, hook: Hook, quick: Hook | None = None, always: bool = False) -> None:
        """The same, behind the module; `always`: after an exception too."""
        chosen = compiled.either(hook, quick)
        handle = module.register_forward_hook(chosen, with_kwargs=True, always_call=always)
        self._handles.append(handle)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TokenPruneError(
            "a wrapped model cannot be copied or pickled; tokenprune.unwrap(model) first and wrap the copy"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)

    # -- of this thread or task ---------------------------------------------------------------------------------------

    @property
    def settings(self) -> PruneConfig:
        """Those a call that begins now would have."""
        own = overrides_here(self)
        return own[-1].config if own else self.config

    @property
    def frame(self) -> Frame | None:
        """The call under way in this thread."""
        stack = self.calls.stack
        return stack[-1].frame if stack else None

    @property
    def outcome(self) -> Outcome | None:
        """Of this thread's or task's last prompt; where it has had none, of the model's."""
        return last_outcome(self) or self.latest

    @outcome.setter
    def outcome(self, outcome: Outcome) -> None:
        note_outcome(self, outcome)
        self.latest = outcome
