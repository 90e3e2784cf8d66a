"""Models of the Hugging Face hub: ``owner/name@COMMIT``, fetched into the hub's cache on this machine.

Only an id with a commit is ever fetched, so that the same words mean the same weights tomorrow (a branch or tag moves);
only configuration, tokenizer and safetensors come along, neither pickled weights nor code. A private model needs the
user's token, in HF_TOKEN or by `hf auth login`.
"""

from __future__ import annotations

import re
from pathlib import Path

from reqat.models.folder import READ, CheckpointNotFoundError

ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<revision>[\w./-]+)")


COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_folder(location: str) -> Path | None:
    """The folder with the snapshot of a model of the hub; None where ``location`` is no id with a revision.

    Raises CheckpointNotFoundError where the revision is no commit, the hub cannot be reached and the cache has no such
    snapshot, or the hub has no such model or commit.
    """
    match = ID.fullmatch(location)
    if match is None:
        return None
    if not COMMIT.fullmatch(match["revision"]):
        raise CheckpointNotFoundError(
            f"{location}: no such folder here; of a model of the hub, name a commit (40 hexadecimal digits, which its "
            f"history lists): {match['name']}@COMMIT. {match['revision']} may mean other weights tomorrow"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id=match["name"], revision=match["revision"], allow_patterns=list(READ)))
    except Exception as error:  # of requests, of the hub, of its cache: as many kinds as ways to fail
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointNotFoundError(
            f"{location}: no such folder here, and the model cannot be fetched from the hub ({said}). Without a "
            "network, fetch it elsewhere (`hf download`) and give its folder; of a private model, set HF_TOKEN"
        ) from error
