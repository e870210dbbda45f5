"""States that a stopped run goes on from: written beside their place and renamed, so that a kill or a full disk leaves the one before."""

import json
import shutil

import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

NAME = "state"


def save(out, models, optimiser, progress):
    # Not before the first step: PyTorch makes an optimiser's state by a step of nothing, which counts.
    making, place, old = out / f".{NAME}-new", out / NAME, out / f".{NAME}-old"
    if dist.get_rank() == 0:
        shutil.rmtree(making, ignore_errors=True)
    dist.barrier()
    weights, adam = get_state_dict(models, optimiser)
    checkpoint.save({"models": weights, "optimiser": adam}, checkpoint_id=str(making))
    if dist.get_rank() == 0:
        (making / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        making.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load(out, models, optimiser, run):
    """What `save` wrote, or none. A state of another run is refused."""
    place = out / NAME if (out / NAME).exists() else out / f".{NAME}-old"
    if not place.exists():
        return None
    progress = json.loads((place / "progress.json").read_text())
    if progress["run"] != run:
        raise SystemExit(f"{out} holds a run with other options, data or models: name another folder")
    weights, adam = get_state_dict(models, optimiser)
    states = {"models": weights, "optimiser": adam}
    checkpoint.load(states, checkpoint_id=str(place))
    set_state_dict(models, optimiser, model_state_dict=states["models"], optim_state_dict=states["optimiser"])
    return progress


def whole(model):
    """All of a model's weights, on the first process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
