"""The artifact: one folder with the portable model, its ops libraries and what is known of them.

    NAME.fnorm/
      manifest.json                 everything below, described; sizes and sha256 of every file
      manifest.json.sha256          its own digest, as sha256sum writes and checks it
      model.onnx                    the fused model; any onnxruntime runs it without the library
      model.onnx.data               its weights, only if they are large: mapped, not read
      lib/VARIANT/fusenorm_ops-DIGEST.so   the kernels for one kind of machine
      golden/inputs.npz, outputs.npz   one recorded run without the library
    NAME.fnorm.sig                  beside it, if it was signed

`open_artifact` checks a folder as a stranger's: the manifest's size and digest, then its JSON, the
paths in it, what lies in the folder, sizes, sha256, and where the model's weights are. Nothing is
parsed by another library or loaded into the process before. The digests show damage, not who made
it: the libraries are native code, so load artifacts only from where you would load a program, or
require a signature.

What is opened is what was checked: `Stored.read` gives a file's bytes only if they have the
manifest's digest, and onnxruntime gets the model as these bytes and the library as a sealed copy of
them in memory, never the path. Weights beside the model are the exception: onnxruntime maps them
from the folder later, so who may write there afterwards can change the model's numbers (but run no
code).
"""

from __future__ import annotations

from fusenorm.artifact.golden import Golden, read_npz, write_npz
from fusenorm.artifact.library import Built, Cuda, Library
from fusenorm.artifact.manifest import FORMAT_VERSION, MANIFEST, sha256
from fusenorm.artifact.read import Stored, open_artifact
from fusenorm.artifact.write import Artifact, Source

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Artifact",
    "Built",
    "Cuda",
    "Golden",
    "Library",
    "Source",
    "Stored",
    "open_artifact",
    "read_npz",
    "sha256",
    "write_npz",
]
