"""The service behind the routes: the engine while there is one, the model and the server's options. Knows no HTTP."""

import time
from dataclasses import dataclass, field
from typing import Literal

from mlx_k2.coordinator.engine import Engine
from mlx_k2.server.api_errors import ApiError, unavailable
from mlx_k2.server.served_model import ServedModel
from mlx_k2.server.sse import KEEPALIVE_S


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server as the user set them."""

    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header beside this machine's own."""
    keepalive: Literal["comment", "chunk", "off"] = "comment"
    keepalive_s: float = KEEPALIVE_S
    strict_model: bool = False
    """Whether a request for another model is refused."""
    mirrors_reasoning: bool = False
    """Whether reasoning is sent under both of its names."""


@dataclass
class Service:
    """What the routes share. ``serve`` is called once, on another thread, when the stages are ready."""

    options: ServerOptions
    model_name: str
    created: int = field(default_factory=lambda: int(time.time()))
    _served: tuple[Engine, ServedModel] | None = None

    def serve(self, engine: Engine, model: ServedModel) -> None:
        """Begin to take requests."""
        self._served = engine, model

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        return self._served is not None and not self._served[0].is_restarting

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of a sequence; None while the model is loading."""
        return None if self._served is None else self._served[1].context_tokens

    def ready(self) -> tuple[Engine, ServedModel]:
        """Return the engine and the model.

        Raises:
            ApiError: 503, the model is loading or the stages restart.
        """
        if self._served is None:
            raise unavailable("the model is loading")
        if self._served[0].is_restarting:
            raise unavailable("the stages start again after a fault")
        return self._served

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name, if names are strict.

        Raises:
            ApiError: 404.
        """
        if self.options.strict_model and name not in (None, self.model_name):
            message = f"the model {name!r} is not served here: {self.model_name!r} is"
            raise ApiError(404, "not_found_error", message, param="model", code="model_not_found")
