"""Check who made an artifact: signatures of OpenSSF's `model-signing`, kept beside the folder.

Sign with the tool itself, which needs nothing of fusenorm:

    model_signing sign key NAME.fnorm --private_key KEY.pem --signature NAME.fnorm.sig
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from pathlib import Path

from fusenorm.artifact.manifest import read_regular
from fusenorm.errors import BadInput

_MOST_BYTES = 16 << 20


def signed_digest(folder: Path, key: Path, name: str) -> str:
    """The sha256 that a file of a folder was signed with, once the folder's signature is verified.

    Args:
        folder: what was signed; the signature is FOLDER.sig.
        key: the public key, an elliptic one in PEM.
        name: the file, as a path in the folder.

    Raises:
        BadInput: there is no such signature, it is not of this key, or the folder was changed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from model_signing.verifying import Config
    except ImportError as error:
        raise BadInput(
            f"checking its signature needs: pip install 'fusenorm[signing]' ({error})", file=folder
        ) from error
    folder = folder.resolve()
    signature = folder.with_name(f"{folder.name}.sig")
    if not signature.exists():
        raise BadInput(f"is not signed: there is no {signature.name} beside it", file=folder)
    content = read_regular(signature, _MOST_BYTES)
    try:
        verifier = Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError) as error:
        raise BadInput(f"is no public key ({error})", file=key) from error
    try:
        # The bytes that are verified are those that are read here.
        with tempfile.NamedTemporaryFile(suffix=".sig") as copy:
            copy.write(content)
            copy.flush()
            verifier.verify(folder, Path(copy.name))
        statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
        resources = statement["predicate"]["resources"]
        digests = {(entry["name"], entry["algorithm"]): entry["digest"] for entry in resources}
        return str(digests[name, "sha256"])
    except InvalidSignature as error:
        raise BadInput(f"{signature.name} is not of the key {key}", file=folder) from error
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise BadInput(f"does not match {signature.name}: {_first(error)}", file=folder) from error


def _first(error: Exception) -> str:
    """The first difference that model-signing found, without its digests."""
    text = str(error).partition(": Expected")[0] or type(error).__name__
    return re.sub(r"Signature mismatch: \[.|\\", "", text)
