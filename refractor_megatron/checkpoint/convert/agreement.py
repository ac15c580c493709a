"""Whether an exported folder's configuration, manifest and this version of the package mean the same model.

Shapes cannot tell who may read whom or how the router turns logits into experts, so these are compared by hash and by
version wherever a folder is opened: by the import, by ``convert verify`` and by ``generate``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...distinction.rules import compile_rules
from ...errors import CheckpointError, ConfigError
from . import hf_manifest, source_files
from .hf_folder import INDEX, SINGLE, HfFolder
from .hf_manifest import CONFIG, MANIFEST, HfManifest

#: A manifest without a codec is of a version that had no such codec; these every version had.
_ALWAYS = ("router", "retrieval_index")


def check_agreement(folder: Path, config: Any, manifest: HfManifest | None) -> None:
    """The rules of ``config`` are those of its hash and of the manifest, whose versions this package can serve.

    Args:
        config: the ``RefractorConfig`` of ``folder``. manifest: None where the folder has none.

    Raises:
        CheckpointError: rules that are none or are not those of the export, or a definition of another version.
    """
    try:
        rules = compile_rules(config.mask_rules, config.roles, config.shared_roles).digest
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG}: mask_rules are no list of rules ({str(error)[:80]}).") from None
    for where, digest in ((CONFIG, config.rules_hash), (MANIFEST, manifest and manifest.rules_hash)):
        if digest is not None and digest != rules:
            raise CheckpointError(
                f"{folder / CONFIG}: the rules of who may read whom are not those that the model was exported with "
                f"(rules_hash of {where}); convert the checkpoint again."
            )
    if manifest is None:
        return
    readable = hf_manifest.readable()
    for name in dict.fromkeys((*_ALWAYS, *sorted(manifest.versions))):
        theirs, ours = manifest.versions.get(name), readable.get(name, frozenset())
        if theirs not in ours:
            known = " or ".join(map(str, sorted(ours))) or "none"
            raise CheckpointError(
                f"{folder} was exported with version {theirs} of the {name}, this version runs {known}; use the "
                "version that exported it."
            )


def check_listed(hf: HfFolder, config: Any, manifest: HfManifest) -> None:
    """The manifest lists the files of ``hf.folder``, all of them, and those without which there is no model.

    A file beside the listed ones is nothing that the export's hashes speak for, and some loaders would run or prefer
    it (a pickle, an adapter, another module). Hidden files belong to version control and caches.

    Args:
        config: the ``RefractorConfig`` of the folder.

    Raises:
        CheckpointError: names the file.
    """
    index = {INDEX} if (hf.folder / INDEX).exists() else {SINGLE}
    needed = {CONFIG, *index, *(stored.file.name for stored in hf.tensors.values()), *_code(hf.folder, config)}
    for name in sorted(needed - manifest.files.keys()):
        raise CheckpointError(
            f"{hf.folder / MANIFEST} does not list {name}, so nothing says that it is as it was exported: export the "
            "model again."
        )
    listed = {hf.folder / name for name in (MANIFEST, *manifest.files)}
    if hf.folder / source_files.RECORD in listed:  # it lists the files in there
        kept = hf.folder / source_files.FOLDER
        listed |= {kept, *(kept / name for name in source_files.listed(hf.folder))}
    for path in sorted([*hf.folder.iterdir(), *(hf.folder / source_files.FOLDER).glob("*")]):
        if path not in listed and not path.name.startswith("."):
            raise CheckpointError(
                f"{path} is not in the manifest: it was added after the export, move it elsewhere or export the model "
                "again."
            )


def _code(folder: Path, config: Any) -> set[str]:
    """Modules that transformers would run for this model: those of ``auto_map`` and what they import from beside them.

    Raises:
        CheckpointError: the configuration names none, or one that is missing.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    places = getattr(config, "auto_map", None)
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{folder / CONFIG} has no auto_map, which names the model's code: export it again.")
    found = {f"{place.split('.')[0]}.py" for place in places.values()}
    try:
        return found.union(*([Path(path).name for path in get_relative_import_files(folder / name)] for name in found))
    except OSError as error:
        name = Path(str(error.filename)).name
        raise CheckpointError(f"{folder / name} is missing, which is code of the model: export it again.") from None
