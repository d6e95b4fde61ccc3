"""The models of a run: each loaded once, by what its folder holds, all on one device."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.rundir import digest_tree

if TYPE_CHECKING:
    from pathlib import Path

    from selfmoa.config import Recipe
    from selfmoa.generators.devices import Device


class Models:
    """Loads each model once: the generators of a run, by what their folders hold.

    Their weights are read when they are first used, and leave the device when others need the
    room (`generators.devices`).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.policy, self.recipe = recipe.policy, recipe
        self._digests: dict[Path, str] = {}
        self._loaded: dict[tuple[str, str], Any] = {}
        self._served: dict[str, dict[str, Any]] = defaultdict(dict)

    @cached_property
    def device(self) -> Device:
        """The device that all of them share."""
        from selfmoa.generators.devices import Device

        return Device(self.policy.device, self.policy.inference)

    def digest(self, folder: Path) -> str:
        """Return the digest of a finished policy; each folder is read for it once.

        Of an adapter it is that of its weights and of its base's, wherever that lies: what answers
        alike has one name, and a run in another folder draws the same.
        """
        from selfmoa.training.policy import base_of, digest_adapter, is_adapter

        if folder not in self._digests:
            self._digests[folder] = (
                digest_adapter(folder, self.digest(base_of(folder)))
                if is_adapter(folder)
                else digest_tree(folder)
            )
        return self._digests[folder]

    def load(self, folder: Path, backend: str = "local") -> Any:
        """Return a generator (or classifier) of a model directory; equal content is loaded once.

        What is "local" is loaded by the engine that the recipe names.
        """
        backend = self.policy.engine if backend == "local" else backend
        digest = self.digest(folder)
        if (backend, digest) not in self._loaded:
            plugin = registry.resolve("generator", backend)
            self._loaded[backend, digest] = plugin.load(
                folder, threads=self.policy.threads, digest=digest, device=self.device
            )
        return self._loaded[backend, digest]

    def answering(self, folder: Path) -> Any:
        """Return the generator of a policy: at the endpoint of the recipe's model, if it has one.

        Its server is told the folder, and has to load it from there.
        """
        endpoint = self.recipe.model.endpoint
        if endpoint is None:
            return self.load(folder)
        return self.serve(endpoint, str(folder.resolve()), self.digest(folder))

    def serve(self, endpoint: str, model: str, digest: str = "") -> Any:
        """Return a generator of a model at an endpoint of the recipe; it is named by its content.

        All models at an endpoint share its budget.
        """
        served = self._served[endpoint]
        if model not in served:
            plugin = registry.resolve("generator", "openai")
            served[model] = plugin(
                self.recipe.endpoints[endpoint],
                model,
                name=digest.removeprefix("sha256:")[:12],
                beside=next(iter(served.values()), None),
            )
        return served[model]

    def free(self) -> None:
        """Give back the memory of all weights, which are read again when they are next used."""
        if "device" in self.__dict__:
            self.device.free()
