"""The demo's comparison in time: a pilot of its own model and data, on emulated hosts joined by a slow link."""

import json
from pathlib import Path
from typing import Any

from lightning_comm.cli.demo.run import MODEL, MODEL_ARGS, WARMUP_SHARE, WEIGHT_DECAY, RunSettings
from lightning_comm.cli.pilot import command as pilot
from lightning_comm.lab.cluster import unavailable

LINK = "100mbit"
_DEVICE_MS = 100  # for a batch: slow enough for four ranks of this model to keep up on two cores
_STEPS, _WARMUP_STEPS = 24, 4
_IMAGES = 1437  # to train on, in DigitsData


def compare(methods: tuple[str, ...], run: RunSettings, repeats: int, folder: Path) -> dict[str, Any] | str:
    """Run the pilot with one emulated host for each of the demo's processes.

    Args:
        methods: The strategies.
        run: What the demo trains.
        repeats: How often each strategy is measured.
        folder: Where the config and the pilot's own folder go.

    Returns:
        The pilot's results, or one sentence with the reason why there are none.

    """
    if (missing := unavailable()) is not None:
        return f"Times on a slow link are left out: emulated hosts cannot be had here ({missing})."
    config = folder / "pilot.yaml"
    config.write_text(json.dumps(_config(run), indent=1))  # which is YAML as well
    arguments = [f"--config={config}", f"--strategies={','.join(methods)}", f"--hosts={run.devices}", f"--link={LINK}"]
    arguments += [f"--device-ms={_DEVICE_MS}", f"--steps={_STEPS}", f"--warmup-steps={_WARMUP_STEPS}"]
    code = pilot.main([*arguments, f"--repeats={repeats}", f"--out={folder / 'pilot'}"])
    found = list((folder / "pilot").glob("*/pilot.json"))
    if code != 0 or not found:
        return f"The pilot failed with exit code {code}; what it printed says why."
    results: dict[str, Any] = json.loads(found[0].read_text())
    return results


def _config(run: RunSettings) -> dict[str, Any]:
    """Return the demo's run as a config of ``lightning-comm fit``."""
    steps = run.epochs * (_IMAGES // run.batch_size // run.devices)
    model = {
        "model_name": MODEL,
        "num_classes": 10,
        "model_args": MODEL_ARGS,
        "lr": run.lr,
        "weight_decay": WEIGHT_DECAY,
        "warmup_steps": round(WARMUP_SHARE * steps),
    }
    return {
        "seed_everything": run.seed,
        "model": {"class_path": "lightning_comm.examples.TimmClassifier", "init_args": model},
        "data": {
            "class_path": "lightning_comm.examples.DigitsData",
            "init_args": {"batch_size": run.batch_size, "seed": run.seed},
        },
        "trainer": {"accelerator": "cpu", "devices": run.devices, "max_epochs": run.epochs},
    }
