"""Errors of the engine and of loading a model.

ChipsetError
├── ModelError                   a model cannot be served
│   ├── ModelNotFound            no such hub id, folder or file
│   ├── GatedModel               the hub wants a token (HF_TOKEN) or an accepted licence
│   ├── HubUnreachable           the hub did not answer and nothing is cached
│   ├── IncompleteDownload       the connection broke; the next start resumes
│   ├── ModelFormatError         a file is corrupt, cut off or inconsistent
│   ├── UnsafeWeights            only pickle weights are there
│   └── UnsupportedArchitecture  no model code for it
├── NotEnoughDisk
├── NotEnoughMemory              says which --max-total-tokens fits
├── InvalidRequest               a request that can never be served (4xx)
│   └── TemplateError            the chat template does not take these messages, or there is none
├── Overloaded                   too many requests at once (429)
├── RequestFailed                a step failed for this request alone
└── EngineDied                   the engine process is gone
    └── WorkerDied               one of its workers is gone, or has stopped
"""

from __future__ import annotations

from ..backends.errors import ChipsetError


class ModelError(ChipsetError):
    """A model cannot be served."""

    exit_code = 3


class ModelNotFound(ModelError):
    """No such hub id, folder or file."""

    exit_code = 3


class GatedModel(ModelError):
    """The hub wants a token or an accepted licence."""

    exit_code = 4


class HubUnreachable(ModelError):
    """The hub did not answer and nothing is cached."""

    exit_code = 5


class IncompleteDownload(ModelError):
    """The connection broke; the next start resumes."""

    exit_code = 6


class ModelFormatError(ModelError):
    """A file is corrupt, cut off or inconsistent."""

    exit_code = 7


class UnsupportedArchitecture(ModelError):
    """No model code for it."""

    exit_code = 8


class UnsafeWeights(ModelError):
    """Only pickle weights are there."""

    exit_code = 14


class NotEnoughDisk(ChipsetError):
    """The cache directory is full."""

    exit_code = 15


class NotEnoughMemory(ChipsetError):
    """The model or its KV cache does not fit; says what would."""

    exit_code = 10


class InvalidRequest(ChipsetError):
    """A request that can never be served; becomes a 4xx."""


class TemplateError(InvalidRequest):
    """The chat template does not take these messages, or the model has none."""


class Overloaded(ChipsetError):
    """Too many requests at once; becomes a 429."""


class RequestFailed(ChipsetError):
    """A step failed for this request alone."""


class EngineDied(ChipsetError):
    """The engine process is gone."""

    exit_code = 13


class WorkerDied(EngineDied):
    """One of the engine's workers is gone, or has stopped: the engine ends with it."""

    exit_code = 13
