"""Optuna's gRPC proxy with the steps of :mod:`dspace.study.database` beside its own calls: server and client.

Imported late: it needs Optuna and gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy
from optuna.storages._grpc.server import make_server
from optuna.trial import FrozenTrial, TrialState, create_trial

from dspace.study.change import Change, Waiting

if TYPE_CHECKING:
    from dspace.study.database import Database

SERVICE = "dspace.Trials"
CALLS = ("Enqueue", "Claim", "Change")
CODES = {
    KeyError: grpc.StatusCode.NOT_FOUND,
    UpdateFinishedTrialError: grpc.StatusCode.FAILED_PRECONDITION,
    ValueError: grpc.StatusCode.INVALID_ARGUMENT,
}
"""Refusals: anything else is taken for a server that is away, and asked again."""


def serve(database: Database, host: str, port: int, pool: ThreadPoolExecutor) -> None:
    """Serve until interrupted. Raises RuntimeError for an address that cannot be had."""

    def change(told: dict[str, Any]) -> Any:
        return database.change(told["trial"], Change.load(told["change"]))

    def enqueue(told: dict[str, Any]) -> None:
        database.enqueue(told["study"], told["waiting"])

    def claim(told: dict[str, Any]) -> Any:
        taken = database.claim(told["study"], told["user"])
        if taken is None:
            return None
        return {
            "id": taken._trial_id,
            "number": taken.number,
            "user": taken.user_attrs,
            "system": taken.system_attrs,
        }

    server = make_server(database, host, port, pool)
    handlers = {"Enqueue": _handler(enqueue), "Claim": _handler(claim), "Change": _handler(change)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.start()
    server.wait_for_termination()


def _handler(act: Callable[[dict[str, Any]], Any]) -> Any:
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return json.dumps(act(json.loads(request))).encode()
        except tuple(CODES) as error:
            context.abort(next(code for kind, code in CODES.items() if isinstance(error, kind)), str(error))
            raise

    return grpc.unary_unary_rpc_method_handler(answer)


class Client(GrpcStorageProxy):
    """Optuna's client; ``enqueue``, ``claim`` and ``change`` raise NotImplementedError where the proxy is not dspace's."""

    def _setup(self) -> None:
        super()._setup()
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in CALLS}

    def _ask(self, name: str, **told: Any) -> Any:
        try:
            return json.loads(self._calls[name](json.dumps(told).encode()))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise NotImplementedError from error
            for kind, code in CODES.items():
                if error.code() == code:
                    raise kind(error.details()) from error
            raise

    def enqueue(self, study_id: int, waiting: Sequence[Waiting]) -> None:
        self._ask("Enqueue", study=study_id, waiting=waiting)

    def change(self, trial_id: int, change: Change) -> bool:
        return bool(self._ask("Change", trial=trial_id, change=change.dump()))

    def claim(self, study_id: int, user: dict[str, Any]) -> FrozenTrial | None:
        told = self._ask("Claim", study=study_id, user=user)
        if told is None:
            return None
        trial = create_trial(state=TrialState.RUNNING, user_attrs=told["user"], system_attrs=told["system"])
        trial.number, trial._trial_id = told["number"], told["id"]
        return trial
