"""Commands that write one file write it to a bucket too."""

from flowhn_jax.storage import place
from tests.command_line import call


def test_a_picture_and_texts(bucket, tmp_path):
    run = call(
        "-m", "flowhn_jax.split", "--config=flowhn_tiny:fa_split", f"--plot={bucket}/plan.png"
    )
    assert run.returncode == 0, run.stderr
    assert f"wrote {bucket}/plan.png" in run.stdout
    assert place(f"{bucket}/plan.png").read().startswith(b"\x89PNG")
    for out in (bucket, str(tmp_path)):
        texts = ["--documents=20", "--size=64", f"--out={out}/recall.jsonl"]
        run = call("-m", "flowhn_jax.data.synthetic", *texts)
        assert run.returncode == 0, run.stderr
    local = (tmp_path / "recall.jsonl").read_bytes()
    assert place(f"{bucket}/recall.jsonl").read() == local
