"""The hooks of a wrapped model: put in once by `wrap`, the same for every method, and taken off by `unwrap`.

The runtime knows neither methods nor families: it asks the family where things are, gives the method what it needs,
and turns selections into shorter hidden states, masks, positions and caches. A file per place where hooks sit:
`forward.py` (the model), `layers.py` (the text model and its layers), `taps.py` (what methods see).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokenprune.config import PruneConfig
from tokenprune.errors import TokenPruneError
from tokenprune.models.base import Family
from tokenprune.runtime import compiled
from tokenprune.runtime.current import Override, begin_override, end_override, overrides_here
from tokenprune.runtime.forward import CallHooks
from tokenprune.runtime.layers import LayerHooks
from tokenprune.runtime.taps import Taps
from tokenprune.runtime.tower import TowerTap
from tokenprune.runtime.vision import noting_sizes
from tokenprune.runtime.wrapped import Wrapped


class Runtime(Wrapped):
    """A wrapped model: its hooks come and go here.

    Args:
        family: of the stock model: where its parts are.
        config: what to do in calls that no `override` says otherwise for.
    """

    def __init__(self, family: Family, config: PruneConfig) -> None:
        super().__init__(family, config)
        self.tower = TowerTap(self)
        self.taps = Taps(self, self.tower)
        self._hooks = (CallHooks(self, self.taps), LayerHooks(self, self.taps), self.taps)
        self._shadows: list[tuple[nn.Module, str]] = []

    # -- life cycle -------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register the hooks; after an error none is left."""
        compiled.forget()
        try:
            for hooks in self._hooks:
                hooks.install()
            if self.family.sizes_ahead:
                self._note_sizes()
            self.taps.arm(self.config)
            self.installed = True
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Undo whatever an `install` that was interrupted has done; once more, should an interrupt come here, too."""
        try:
            self._remove()
        finally:
            self._remove()

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
            if not set(self.overrides).issubset(own):
                raise TokenPruneError(
                    "an override of this model is in force in another thread or task; unwrap it after that has ended"
                )
            for override in own:
                end_override(override)
            self._remove()

    def _remove(self) -> None:
        compiled.forget()
        self.installed = False
        self.take_off()
        self.calls.close()
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
        try:
            with self.gate:
                if not self.installed:
                    raise TokenPruneError("this model was unwrapped by another thread just now")
                self.taps.arm(config)  # what the method sees, where nobody needed it before
                self.overrides.add(override)
            begin_override(override)
            yield
        finally:
            # Twice: an interrupt may come here, too. Should it come in both, the override ends with this frame, which
            # alone holds it.
            try:
                self._end_override(override)
            finally:
                self._end_override(override)

    def _end_override(self, override: Override) -> None:
        end_override(override)
        with self.gate:
            self.overrides.discard(override)

    def _note_sizes(self) -> None:
        """Put a noting function before get_image_features and get_video_features, until the model is unwrapped."""
        base = self.family.base()
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(base, name) and name not in vars(base):
                self._shadows.append((base, name))
                setattr(base, name, noting_sizes(getattr(base, name), kind, self.family))
