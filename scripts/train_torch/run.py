"""A training run: steps, validations, states, and the folder that comes out."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

from . import data, order, pair, rollout, state
from .loss import rate, row_losses, state_distances

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def digest(folder):
    """Of a checkpoint's weights, as `overfill` has it."""
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
    sums = [(hashlib.file_digest(file.open("rb"), "sha256").hexdigest(), file.name) for file in files]
    if len(sums) == 1:
        return sums[0][0]
    return hashlib.sha256("".join(f"{sha}  {name}\n" for sha, name in sums).encode()).hexdigest()


class Run:
    def __init__(self, options):
        self.options = o = options
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if o.device == "cuda" else "gloo", rank=self.rank, world_size=self.world)
        self.device = torch.device(o.device)
        if (o.out / "model").exists():
            raise SystemExit(f"{o.out / 'model'} exists already: the run is over; name another folder")
        if o.on_policy and o.loss != "distill":
            raise SystemExit("--on-policy learns from the full model's distribution: use --loss distill")
        if o.on_policy and o.prompt_share is not None:
            raise SystemExit("--on-policy writes after the full model's reading of the whole prompt: leave --prompt-share out")
        o.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(o.full)
        mesh = init_device_mesh(o.device, (self.world,))
        compute = DTYPES[o.precision]
        full = pair.load(o.full, compute).requires_grad_(False).eval()
        model = pair.load(o.init, torch.float32)
        longest = min(o.max_tokens, full.config.max_position_embeddings, model.config.max_position_embeddings)
        self.layers = pair.kept_layers(o.kv, full.config.num_hidden_layers, model.config.num_hidden_layers)
        self.rounding = [DTYPES[o.kv_cache], DTYPES[o.kv_wire], DTYPES[o.kv_cache]]
        mapping = None
        if o.hidden_weight > 0:
            mapping = torch.nn.Linear(model.config.hidden_size, full.config.hidden_size, bias=False)
            norm = model.model.norm.weight.detach()
            with torch.no_grad():
                mapping.weight.zero_()
                for i in range(min(mapping.weight.shape)):
                    mapping.weight[i, i] = 1 / norm[i] if abs(norm[i]) > 1e-3 else 0
        self.full = pair.Net(full).to(self.device).sharded(mesh, compute)
        self.net = pair.Net(model, mapping).to(self.device).sharded(mesh, compute, o.checkpoint_layers)
        self.train, train_left = data.read(o.data, self.tokenizer, longest)
        self.valid, valid_left = data.read(o.valid, self.tokenizer, longest, o.valid_samples) if o.valid else ([], 0)
        self.say(f"data: {len(self.train)} conversations, {train_left} left out; valid: {len(self.valid)}, {valid_left} left out")
        lengths = [len(example.response) for example in self.train]
        self.plan = order.steps(lengths, o.batch_tokens, o.accumulate, o.epochs, o.steps, o.seed)
        decay = [p for p in self.net.parameters() if p.dim() > 1]
        others = [p for p in self.net.parameters() if p.dim() <= 1]
        groups = [{"params": decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
        self.models = {"full": digest(o.full), "init": digest(o.init)}
        named = {key: str(value) for key, value in vars(o).items() if key not in ("out", "device", "full", "init", "data", "valid")}
        tokens = [[example.prompt, example.response] for example in self.train + self.valid]
        run = hashlib.sha256(json.dumps([named, self.models, tokens]).encode()).hexdigest()
        self.progress = {"run": run, "step": 0, "tokens": 0, "best": None}
        self.progress = state.load(o.out, self.net, self.adam, run) or self.progress
        self.log = self.cut_log()

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def cut_log(self):
        """The log up to the state that is gone on from."""
        if self.rank > 0:
            return None
        path = self.options.out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.progress["step"]]
        path.write_text("".join(line + "\n" for line in kept))
        return path

    def tell(self, record):
        if self.rank == 0:
            with self.log.open("a") as log:
                log.write(json.dumps(record) + "\n")

    def go(self):
        o, steps = self.options, len(self.plan)
        if self.progress["step"] == 0:
            self.validate()
        while self.progress["step"] < steps:
            self.step()
            done = self.progress["step"]
            if done % o.validate_every == 0 or done == steps:
                self.validate()
            elif done % o.save_every == 0:
                state.save(o.out, self.net, self.adam, self.progress)
        self.end()
        dist.destroy_process_group()

    def cut(self, example, epoch, index, training):
        """How much of an example the full model reads."""
        o, prompt, response = self.options, len(example.prompt), len(example.response)
        if o.mode == "decode":
            return 0
        if o.random_cutoff and training:
            return order.cut_anywhere(prompt, response, o.seed, epoch, index)
        return prompt if o.prompt_share is None else min(math.floor(prompt * o.prompt_share + 0.5), prompt)

    def own_answers(self, examples, indices, epoch):
        """The examples with answers that the decode model writes."""
        o = self.options
        keys = [o.seed ^ ((epoch << 40 | index) * 0x9E3779B97F4A7C15 % 2**64) for index in indices]
        keys = [key % 2**63 for key in keys]
        if o.rollout_url:
            return rollout.asked(o.rollout_url, o.rollout_key, o.rollout_model, examples, o, keys)
        end = self.tokenizer.eos_token_id

        def act(full):
            write = lambda net: rollout.written(  # noqa: E731
                full.model, net.model, examples, self.layers, self.rounding, o, end, keys, self.device
            )  # fmt: skip
            return self.net(write)

        with torch.no_grad():
            return self.full(act)

    def losses(self, examples, cuts, divergence):
        """Of each learned token of this process's examples: cross-entropy, KL, what is minimised of it, distance of states, and
        whether the most likely token is the full model's."""
        o = self.options
        reading, top = None, o.top
        if top > 0 or max(cuts) > 0:
            with torch.no_grad():
                reading = self.full(lambda full: pair.Reading(full.model, examples, top, o.hidden_weight > 0, self.device))
        context = reading.context(self.layers, cuts, self.rounding) if max(cuts) > 0 else None

        def act(net):
            states, gold, which = pair.decode(net.model, examples, cuts, context, self.device)
            logits = net.model.lm_head(states)
            known = (reading.known[0][which], reading.known[1][which]) if top > 0 else None
            ce, kl, minimised = row_losses(logits, gold, known, divergence)
            far = torch.zeros_like(ce)
            if net.mapping is not None:
                far = state_distances(states, net.mapping, reading.states[which])
            agrees = logits.argmax(-1) == known[0][:, 0] if known else torch.zeros_like(gold, dtype=torch.bool)
            return ce, kl, minimised, far, agrees

        return self.net(act)

    def step(self):
        o, begun = self.options, time.monotonic()
        number = self.progress["step"]
        epoch, batches = self.plan[number]
        taken, own = [], []
        for at, batch in enumerate(batches):
            # Every process takes part in every batch; one without a share of its own computes for nothing.
            mine = batch[self.rank :: self.world]
            indices = mine or batch[:1]
            examples = [self.train[index] for index in indices]
            on_policy = order.on_policy(number * o.accumulate + at, torch.tensor(o.on_policy, dtype=torch.float32).item())
            if on_policy:
                examples = self.own_answers(examples, indices, epoch)
            cuts = [self.cut(example, epoch, index, True) for example, index in zip(examples, indices, strict=True)]
            taken.append((examples, cuts, bool(mine)))
            own.append(on_policy)
        tokens = sum(len(pair.learned(e, cut)) for examples, cuts, mine in taken if mine for e, cut in zip(examples, cuts, strict=True))
        tokens = int(self.summed([tokens])[0])
        sums = [0.0] * 4
        self.adam.zero_grad()
        for at, ((examples, cuts, mine), on_policy) in enumerate(zip(taken, own, strict=True)):
            self.net.set_requires_gradient_sync(at + 1 == len(taken))
            ce, kl, minimised, far, _ = self.losses(examples, cuts, o.divergence)
            weight = 0.0 if on_policy else (o.ce_weight if o.loss == "distill" else 1.0)
            each = weight * ce + o.hidden_weight * far + (minimised if o.loss == "distill" else 0.0)
            # Gradients are averaged over the processes; the loss is a mean over all tokens of the step.
            (each.sum() * (float(mine) * self.world / tokens)).backward()
            if mine:
                sums = [a + float(b.detach().sum()) for a, b in zip(sums, (each, ce, kl, far), strict=True)]
        loss, ce, kl, far = (x / tokens for x in self.summed(sums))
        if not math.isfinite(loss):
            raise SystemExit(f"step {number + 1}: the loss is no number; the last saved state stays")
        gradient = torch.nn.utils.clip_grad_norm_(self.net.parameters(), o.clip)
        gradient = float(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
        if not math.isfinite(gradient):
            raise SystemExit(f"step {number + 1}: the gradient is no number; the last saved state stays")
        lr = rate(number, len(self.plan), o.lr, o.warmup, o.last_lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.progress["step"], self.progress["tokens"] = number + 1, self.progress["tokens"] + tokens
        record = {"event": "step", "step": number + 1, "epoch": epoch, "loss": loss, "ce": ce, "kl": kl, "states": far, "rate": lr}
        record |= {"gradient": gradient, "tokens": tokens, "seconds": time.monotonic() - begun}
        self.tell(record)

    def summed(self, numbers):
        total = torch.tensor(numbers, dtype=torch.float64, device="cpu" if self.options.device == "cpu" else self.device)
        dist.all_reduce(total)
        return total.tolist()

    @torch.no_grad()
    def validate(self):
        """Measures the validation set, keeps the model if it is the best so far, and saves the state."""
        o, step = self.options, self.progress["step"]
        if self.valid:
            sums = [0.0] * 6
            lengths = [len(example.response) for example in self.valid]
            for batch in order.filled(lengths, range(len(lengths)), o.batch_tokens):
                mine = batch[self.rank :: self.world]
                examples = [self.valid[index] for index in mine or batch[:1]]
                cuts = [self.cut(example, 0, 0, False) for example in examples]
                ce, kl, minimised, far, agrees = self.losses(examples, cuts, o.divergence)
                if not mine:
                    continue
                # The first token of an answer is the full model's when the pair is served.
                keep = [place > 0 for example, cut in zip(examples, cuts, strict=True) for place in pair.learned(example, cut)]
                keep = torch.tensor(keep, device=self.device)
                ce, kl, minimised, far, agrees = (x[keep] for x in (ce, kl, minimised, far, agrees))
                each = (o.ce_weight if o.loss == "distill" else 1.0) * ce + o.hidden_weight * far
                each = each + (minimised if o.loss == "distill" else 0.0)
                of = [each.sum(), ce.sum(), kl.sum(), far.sum(), agrees.sum(), torch.tensor(len(ce))]
                sums = [a + float(b) for a, b in zip(sums, of, strict=True)]
            *totals, tokens = self.summed(sums)
            loss, ce, kl, far, agreement = (x / tokens for x in totals)
            record = {"event": "validation", "step": step, "loss": loss, "ce": ce, "kl": kl, "states": far, "agreement": agreement}
            self.tell(record | {"tokens": int(tokens)})
            self.say(f"step {step}: validation loss {loss:.4f}, cross-entropy {ce:.4f}, divergence {kl:.4f}, agreement {100 * agreement:.1f} %")
            if self.progress["best"] is None or loss < self.progress["best"][1]:
                before, self.progress["best"] = self.progress["best"], [step, loss]
                self.write(o.out / f"best-{step:06}")
                if before and self.rank == 0:
                    (o.out / f"best-{before[0]:06}").rename(o.out / ".best-before")
        if step > 0:
            state.save(o.out, self.net, self.adam, self.progress)
        if self.rank == 0 and (o.out / ".best-before").exists():
            shutil.rmtree(o.out / ".best-before")

    def write(self, folder):
        """Writes the model as it is now, with how it was made."""
        weights = state.whole(self.net)
        if self.rank == 0:
            of_model = {name.removeprefix("model."): x for name, x in weights.items() if name.startswith("model.")}
            if folder.exists():
                shutil.rmtree(folder)
            o = self.options
            provenance = {"made_by": "train_torch", "full_sha256": self.models["full"], "init_sha256": self.models["init"]}
            init = o.init / "provenance.json"
            if init.exists():
                provenance["init"] = json.loads(init.read_text())
            skipped = ("full", "init", "data", "valid", "out", "rollout_url", "rollout_key")
            provenance["options"] = {key: value for key, value in vars(o).items() if key not in skipped}
            provenance["data"] = {"file": o.data.name, "conversations": len(self.train)}
            provenance |= {"steps": self.progress["step"], "of_steps": len(self.plan), "response_tokens": self.progress["tokens"]}
            provenance["processes"] = self.world
            pair.save(self.net.model, self.tokenizer, o.init, folder, of_model, provenance)
        dist.barrier()

    def end(self):
        out, best = self.options.out, self.progress["best"]
        if best is None:
            self.write(out / "model")
        elif self.rank == 0:
            (out / f"best-{best[0]:06}").rename(out / "model")
        if self.rank == 0:
            shutil.rmtree(out / state.NAME)
            print(f"{self.progress['step']} steps\n{out / 'model'}", flush=True)
        dist.barrier()

