"""What may be done with a saved checkpoint without a worker: delete, keep longer, publish, copy, hand out its files.

Blocking file work; the routes (rest.py) call it in threads. Answers are the SDK's shapes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError, RequestError
from tinker_hpc.gateway import checkpoints, publishing, retention
from tinker_hpc.gateway.checkpoints import METADATA, Checkpoint, TinkerPath, iso_time
from tinker_hpc.gateway.refusals import Refusal, bad_request, conflicting, try_again, unknown
from tinker_hpc.gateway.validate import ttl_seconds
from tinker_hpc.private_files import fsync_folder, make_private, write_json

# file:// URLs do not expire; the SDK wants a time, and asks again when it is near.
URLS_HOLD_S = 24 * 3600.0


class Shelf:
    """The checkpoints of a data root, as far as they are managed.

    Args:
        root: the data root.
        exports: a folder of this run for archives, emptied at every start of its gateway.
    """

    def __init__(self, root: Path, exports: Path) -> None:
        self.root = root
        self.exports = exports
        shutil.rmtree(exports, ignore_errors=True)

    def find(self, model_id: str, kind: str, name: str) -> Checkpoint:
        """Raises: Refusal 404 if there is none, or it is gone; 400 if the parts are no path."""
        return self._loaded(_judged(lambda: TinkerPath.of_parts(model_id, kind, name)))

    def delete(self, model_id: str, kind: str, name: str) -> None:
        """Refused and unlisted from now on; its files go now, or when the runs that read them are over."""
        checkpoint = self.find(model_id, kind, name)

        def act() -> None:
            if str(checkpoint.path) in retention.still_read(self.root):
                expires_at = checkpoint.expires_at
                checkpoints.write_retention(checkpoint, expires_at=expires_at, deleted_at=time.time())
            elif retention.remove(checkpoint) and checkpoint.public:
                publishing.close_above(checkpoint, self.root)

        _writing(f"{checkpoint.path} was not deleted", act)

    def set_ttl(self, model_id: str, kind: str, name: str, payload: dict[str, Any]) -> None:
        """Keep it for `ttl_seconds` from now; null keeps it for ever."""
        if "ttl_seconds" not in payload:
            raise bad_request("ttl_seconds is missing; give seconds from now, or null to keep the checkpoint.")
        ttl = _judged(lambda: ttl_seconds(payload["ttl_seconds"]))
        checkpoint = self.find(model_id, kind, name)
        expires_at = None if ttl is None else time.time() + ttl
        _writing(
            f"the TTL of {checkpoint.path} was not changed",
            lambda: checkpoints.write_retention(checkpoint, expires_at=expires_at),
        )

    def publish(self, model_id: str, kind: str, name: str) -> None:
        """Let the data root's group read it (publishing.py)."""
        checkpoint = self.find(model_id, kind, name)
        _writing(f"{checkpoint.path} was not published", lambda: publishing.publish(checkpoint, self.root))

    def unpublish(self, model_id: str, kind: str, name: str) -> None:
        """Take that back."""
        checkpoint = self.find(model_id, kind, name)
        _writing(f"{checkpoint.path} is published still", lambda: publishing.unpublish(checkpoint, self.root))

    def copy(self, source: Any, model_id: str, ttl: int | None) -> str:
        """Copy a checkpoint to the same kind and name under another model id; the new tinker:// path.

        The files are copied, not linked: publishing, damaging or deleting one must not touch the other. A copy that is
        there already (the same request, sent again) is answered again.
        """
        checkpoint = self._loaded(_judged(lambda: TinkerPath.parse(source)))
        target = TinkerPath(model_id, checkpoint.path.kind, checkpoint.path.name)
        folder = target.folder(self.root)
        request_id = f"copy of {checkpoint.path}"
        if folder.exists():
            if json.loads((folder / METADATA).read_bytes()).get("request_id") == request_id:
                return str(target)
            raise conflicting(f"{target} exists already and is not a copy of {checkpoint.path}.")
        now = time.time()
        metadata = {
            **checkpoint.metadata,
            "path": str(target),
            "model_id": model_id,
            "request_id": request_id,
            "created_at": now,
            "ttl_seconds": ttl,
            "expires_at": None if ttl is None else now + ttl,
        }

        def act() -> None:
            unfinished = folder.parent / f".{folder.name}.copying-{secrets.token_hex(4)}"
            make_private(unfinished)
            try:
                for name in checkpoint.metadata.get("files", {}):
                    shutil.copyfile(checkpoint.folder / name, unfinished / name)
                    _sync(unfinished / name)
                write_json(unfinished / METADATA, metadata)
                os.rename(unfinished, folder)
                fsync_folder(folder.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

        _writing(f"{checkpoint.path} was not copied", act)
        return str(target)

    def external_urls(self, model_id: str, kind: str, name: str) -> dict[str, Any]:
        """A file:// URL for each file of an external weights checkpoint."""
        if kind != "external_weights":
            raise bad_request(
                f"{model_id}/{kind}/{name} is not an external weights checkpoint. Make one with "
                "training_client.save_weights_external(name), or read the folder itself: "
                f"`tinker-hpc export tinker://{model_id}/{kind}/{name} --to FOLDER`."
            )
        checkpoint = self.find(model_id, kind, name)
        files = sorted(checkpoint.metadata.get("files", {}))
        expires = min(time.time() + URLS_HOLD_S, checkpoint.expires_at or float("inf"))
        return {"urls": {file: (checkpoint.folder / file).as_uri() for file in files}, "expires": iso_time(expires)}

    def archive(self, model_id: str, kind: str, name: str) -> dict[str, Any]:
        """One tar of the checkpoint's files (SDKs before 0.36 download that), as a file:// URL."""
        checkpoint = self.find(model_id, kind, name)
        expires = time.time() + URLS_HOLD_S
        file = self.exports / f"{checkpoint.folder.parent.parent.name}_{kind}_{name}-{int(checkpoint.created_at)}.tar"

        def act() -> None:
            make_private(self.exports)
            unfinished = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
            with tarfile.open(unfinished, "w") as tar:
                for each in sorted(checkpoint.metadata.get("files", {})):
                    tar.add(checkpoint.folder / each, arcname=each)
            os.replace(unfinished, file)

        if not file.exists():
            _writing(f"no archive of {checkpoint.path} was made", act)
        return {"url": file.as_uri(), "expires": iso_time(expires)}

    def _loaded(self, path: TinkerPath) -> Checkpoint:
        try:
            return checkpoints.load(self.root, str(path))
        except RequestError as error:
            raise unknown(str(error)) from error


def _judged(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except RequestError as error:
        raise bad_request(str(error)) from error


def _writing(nothing: str, act: Callable[[], None]) -> None:
    """Run something that changes files. Raises: Refusal 422 in words, 503 if the disk is in the way."""
    try:
        act()
    except RequestError as error:
        raise Refusal(422, str(error)) from error
    except DataRootError as error:
        raise try_again(f"{nothing}: {error}") from error
    except OSError as error:
        raise try_again(f"{nothing}: {error.strerror} ({error.filename}).") from error


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
