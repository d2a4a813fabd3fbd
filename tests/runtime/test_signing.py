"""Signatures made by the model-signing tool with a key of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import fusenorm
from fusenorm import cli
from fusenorm.artifact import open_artifact, signing
from fusenorm.errors import BadInput
from tests.runtime.test_artifact import edit


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ours.pem, ours.pub and theirs.pub."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def signed(folder: Path, keys: Path) -> Path:
    """The artifact, signed with our key by the tool's own command."""
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder)]
    options = ["--private_key", str(keys / "ours.pem"), "--signature", f"{folder}.sig"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return folder


def test_a_signed_artifact_loads(signed: Path, keys: Path, feed) -> None:
    session = fusenorm.load(signed, require_signature=keys / "ours.pub")
    assert session.run(None, feed)[0].shape == (2, 3, 8)
    stored = open_artifact(signed)
    fusenorm.load(stored, require_signature=keys / "ours.pub")
    assert fusenorm.verify(signed, require_signature=keys / "ours.pub").ok


def test_every_command_checks_it(signed: Path, keys: Path, feed, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feed)
    commands = (
        ["run", signed, "--inputs", tmp_path / "in.npz"],
        ["verify", signed],
        ["bench", signed, "--seconds", 0, "--against", "onnxruntime"],
        ["inspect", signed],
        ["pack", signed, "--oci", "-o", tmp_path / "layout"],
    )
    for command in commands:
        for key, code in (("ours", 0), ("theirs", 2)):
            arguments = [*command, "--require-signature", keys / f"{key}.pub"]
            result = CliRunner().invoke(cli.app, [str(part) for part in arguments])
            assert result.exit_code == code, result.output
        assert "fused.fnorm.sig" in result.stderr
        assert result.stderr.count("\n") == 1


def test_another_key(signed: Path, keys: Path) -> None:
    with pytest.raises(BadInput, match=r"does not match fused\.fnorm\.sig: Key mismatch"):
        open_artifact(signed, require_signature=keys / "theirs.pub")
    text = (signed.parent / "fused.fnorm.sig").read_text()
    bundle = json.loads(text)
    signature = bundle["dsseEnvelope"]["signatures"][0]
    flipped = "B" if signature["sig"][20] == "A" else "A"
    signature["sig"] = signature["sig"][:20] + flipped + signature["sig"][21:]
    (signed.parent / "fused.fnorm.sig").write_text(json.dumps(bundle))
    with pytest.raises(BadInput, match=r"fused\.fnorm\.sig is not of the key .*ours\.pub"):
        open_artifact(signed, require_signature=keys / "ours.pub")


@pytest.mark.parametrize("name", ["model.onnx", "golden/inputs.npz", "manifest.json"])
def test_a_changed_file(signed: Path, keys: Path, name: str) -> None:
    with open(signed / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(BadInput, match=f"sig: Hash mismatch for '{name}'$") as error:
        fusenorm.load(signed, require_signature=keys / "ours.pub")
    assert "\n" not in str(error.value)


def test_the_signature_is_checked_before_the_manifest_is_believed(signed: Path, keys: Path) -> None:
    """What a stranger may do: everything consistent, but not signed."""
    edit(signed, lambda manifest: manifest.update(name="evil"))
    assert open_artifact(signed).name == "evil"
    with pytest.raises(BadInput, match=r"does not match fused\.fnorm\.sig"):
        open_artifact(signed, require_signature=keys / "ours.pub")


def test_a_manifest_exchanged_after_the_signature_was_checked(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusenorm.artifact import read

    def raced(*arguments: object) -> str:
        digest = signing.signed_digest(*arguments)
        edit(signed, lambda manifest: manifest.update(name="evil"))
        return digest

    monkeypatch.setattr(read, "signed_digest", raced)
    with pytest.raises(BadInput, match=r"manifest\.json: is not the one that was signed"):
        open_artifact(signed, require_signature=keys / "ours.pub")


def test_missing_signatures_and_keys(folder: Path, fused: Path, keys: Path) -> None:
    key = keys / "ours.pub"
    with pytest.raises(BadInput, match=r"is not signed: there is no fused\.fnorm\.sig beside it"):
        fusenorm.load(folder, require_signature=key)
    with pytest.raises(BadInput, match="only an artifact can be signed"):
        fusenorm.load(fused, require_signature=key)
    signature = Path(f"{folder}.sig")
    signature.write_text("{}")
    with pytest.raises(BadInput, match=r"nokey\.pub: is no public key"):
        fusenorm.load(folder, require_signature=keys / "nokey.pub")
    with pytest.raises(BadInput, match=r"fused\.fnorm\.sig: is no public key"):
        fusenorm.load(folder, require_signature=signature)
    for text in ("{}", "hello", '{"verificationMaterial": {}, "dsseEnvelope": 3}'):
        signature.write_text(text)
        with pytest.raises(BadInput, match=r"does not match fused\.fnorm\.sig"):
            fusenorm.load(folder, require_signature=key)


def test_a_link_to_the_folder(signed: Path, keys: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(signed)
    open_artifact(link, require_signature=keys / "ours.pub")


def test_the_package_is_named_if_it_is_missing(folder: Path, keys: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(BadInput, match=r"pip install 'fusenorm\[signing\]'"):
        fusenorm.load(folder, require_signature=keys / "ours.pub")
