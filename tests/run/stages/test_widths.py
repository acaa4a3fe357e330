"""A table's errors are those of models with one FFN narrowed, and are measured once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ffsplit
from ffsplit.calibration.readers import make_reader
from ffsplit.errors import FFSplitError
from ffsplit.measurement.fidelity import fidelity
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.names import base_of
from ffsplit.run.checks import measures_widths
from ffsplit.run.execution import Execution
from ffsplit.run.job import prepare
from ffsplit.run.stages import search
from ffsplit.run.stages import widths as stage
from ffsplit.run.stages.widths import TableJob, sum_of_kl
from ffsplit.runtime.modules import narrow_ffn
from ffsplit.store.manifest import Manifest
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import save_checkpoint as save_family

Measured = list[tuple[float, ...]]


class Seen:
    """The jobs of both tables, their results, and what the scratch then held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[TableJob] = []
        self.errors: list[Measured] = []
        self.fitted: list[dict[str, torch.Tensor]] = []
        measured = stage._measured

        def seeing(execution: Execution, name: str, job: TableJob) -> Measured:
            found = measured(execution, name, job)
            self.jobs.append(job)
            self.errors.append(found)
            self.fitted = [load_file(job.scratch.path(entry)) for entry in job.fitted]
            return found

        monkeypatch.setattr(stage, "_measured", seeing)

    def narrowed(self, widths: dict[int, int]) -> Any:
        """The original with FFNs that really have so few neurons, by layer."""
        checkpoint = self.jobs[0].original.checkpoint()
        model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
        for layer, width in widths.items():
            ffn, found = checkpoint.ffns[layer], self.fitted[layer]
            if width == ffn.shape.num_neurons:
                continue
            block = base_of(model).get_submodule(ffn.block)
            kept, down = found[f"{width}.neurons"], found[f"{width}.down"]
            whole = {
                path: copy.deepcopy(block.get_submodule(path))
                for path in (ffn.paths.up, ffn.paths.gate)
                if path
            }
            narrow_ffn(block, ffn.paths, width)
            for path, old in whole.items():
                new: Any = block.get_submodule(path)
                new.weight.data = old.weight.data[:, kept] if ffn.paths.transposed else old.weight.data[kept]
                if old.bias is not None:
                    new.bias.data = old.bias.data[kept]
            module: Any = block.get_submodule(ffn.paths.down)
            module.weight.data = (down.T if ffn.paths.transposed else down).contiguous()
            if f"{width}.bias" in found:
                module.bias.data = found[f"{width}.bias"]
        return model

    def divergence(self, model: Any) -> float:
        job, checkpoint = self.jobs[0], self.jobs[0].original.checkpoint()
        original = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
        reader = make_reader(checkpoint, max_length=job.max_length, batch_tokens=job.batch_tokens)
        batches = list(reader.batches(reader.encode(job.rows)))
        return fidelity(original, model, batches, makes="next_tokens")["kl_divergence"]


def searched(small_job: SmallJob, out: Path, model: Path, **fields: Any) -> Manifest:
    recipe = small_job.recipe(allocation="search")
    return ffsplit.compress(
        small_job.config(out, **({"recipe": recipe, "model": str(model), "keep": 0.3} | fields))
    )


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "ForCausalLM"), ("gpt2", "LMHeadModel"), ("opt", "ForCausalLM")]
)
def test_the_errors_are_those_of_models_that_are_really_narrower(
    family: str,
    head: str,
    small_job: SmallJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gated or not, with weights [out, in] or [in, out], with a bias or none; alone and around a solution."""
    seen = Seen(monkeypatch)
    searched(small_job, tmp_path / "out", save_family(tmp_path / family, family, head))
    alone, around = seen.jobs
    assert alone.around is None and around.around is not None
    for job, errors in zip(seen.jobs, seen.errors, strict=True):
        others = dict(enumerate(job.around or ()))
        for layer in (0, len(job.widths) - 1):
            for index in (0, len(job.widths[layer]) - 1):
                model = seen.narrowed(others | {layer: job.widths[layer][index]})
                assert errors[layer][index] == pytest.approx(seen.divergence(model), rel=1e-3, abs=1e-6)
    assert all(each[-1] > 0 for each in seen.errors[0]), (
        "whole FFNs are not measured alone: they cost nothing"
    )


def test_blocks_before_the_exchanged_one_need_not_run_again(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_of: Any
) -> None:
    seen, model = Seen(monkeypatch), checkpoint_of("llama", head="ForCausalLM")
    searched(small_job, tmp_path / "out", model)
    monkeypatch.setattr(Checkpoint, "can_stream", False)
    searched(small_job, tmp_path / "whole", model)
    for ours, whole in zip(seen.errors[:2], seen.errors[2:], strict=True):
        for mine, other in zip(ours, whole, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-9)


def test_a_killed_search_measures_nothing_twice(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_of: Any
) -> None:
    model, measure = checkpoint_of("llama", head="ForCausalLM"), stage.TableWorker._measure
    undisturbed = searched(small_job, tmp_path / "other", model)

    def failing(self: Any, item: Any) -> Any:
        if self._job.around is not None and item.layer == 1:
            raise FFSplitError("killed")
        return measure(self, item)

    with monkeypatch.context() as patched:
        patched.setattr(stage.TableWorker, "_measure", failing)
        with pytest.raises(FFSplitError, match="killed"):
            searched(small_job, tmp_path / "out", model)
    again = searched(small_job, tmp_path / "out", model)
    reused = {each.name: each.num_reused for each in again.stages}
    assert (reused["widths"], reused["tables"], reused["tables again"]) == (3, 3, 1)
    assert again.allocation == undisturbed.allocation


def test_a_budget_below_the_narrowest_widths_stays_uniform(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stage, "measured_widths", lambda shape, **_: (shape.num_neurons // 2, shape.num_neurons)
    )
    manifest = searched(small_job, tmp_path / "out", checkpoint_of("llama", head="ForCausalLM"))
    assert manifest.plain and manifest.allocation is not None
    assert [each.name for each in manifest.allocation.candidates] == ["uniform"]


def test_widths_of_all_layers_are_multiples(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No whole FFN either: 20 does not divide its 64 neurons."""
    monkeypatch.setattr(search, "LEAST_GAIN", -1e9)
    seen = Seen(monkeypatch)
    model = checkpoint_of("llama", head="ForCausalLM")
    manifest = searched(small_job, tmp_path / "out", model, keep=0.7, width_multiple=20)
    assert set(seen.jobs[0].widths) == {(20, 40, 60)}
    assert set(seen.jobs[1].widths) == {(20, 40, 60, 64)}
    assert manifest.allocation is not None and manifest.allocation.chosen == "tables"
    widths = {layer.layout.num_neurons for layer in manifest.layers}
    assert widths <= {20, 40, 60} and len(widths) > 1
    assert manifest.keep is not None and manifest.keep <= 0.7


def test_tables_are_for_language_models_that_a_closed_form_narrows(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    def measures(model: Path, step: str, **fields: Any) -> bool:
        recipe = small_job.recipe(allocation="search", step=step, **fields)
        run = prepare(small_job.config(tmp_path, model=str(model), recipe=recipe))
        return measures_widths(run.checkpoint, run.layouts, run.recipe.steps)

    llama = checkpoint_of("llama", head="ForCausalLM")
    assert measures(llama, "{kind: prune}")
    assert measures(llama, "{kind: prune}, {kind: distill, num_steps: 3}")
    assert not measures(llama, LOW_RANK, heavy_share=0.5)
    assert not measures(checkpoint_of("bert"), "{kind: prune}")


def test_the_divergence_is_summed_over_tokens() -> None:
    a_TV, b_TV = torch.randn(1500, 7), torch.randn(1500, 7)
    p, q = (torch.softmax(each.double(), -1) for each in (a_TV, b_TV))
    assert sum_of_kl(a_TV, b_TV) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert sum_of_kl(a_TV, a_TV) == 0
    with pytest.raises(FFSplitError, match="not finite"):
        sum_of_kl(a_TV, b_TV * torch.nan)
