"""One-line changes that break the package, and the fast test that catches each: `make mutants`.

Each is made in a copy of the package, of which the named test then has to fail. A test that passes with its
feature removed shows up here as a mutant that survives.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("ffsplit", "tests", "benchmarks", "jobs", "pyproject.toml")
NUM_AT_ONCE = 2
FORK = multiprocessing.get_context("fork")
LIBRARIES = ("torch", "transformers", "pyarrow.parquet", "pydantic", "boto3", "hypothesis")
"""What takes seconds to import, and every test would."""
FAILED = pytest.ExitCode.TESTS_FAILED


class Mutant(NamedTuple):
    """A file of the package, a text that it has once, what stands there instead, and who has to notice."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    # store
    Mutant(
        "store/publish.py",
        "store.put_if_absent(key, record_bytes(commit))",
        "store.put_bytes(key, record_bytes(commit))",
        "tests/store/test_publish.py::test_losing_at_the_last_moment_leaves_only_the_winner",
    ),
    Mutant(
        "store/commits.py",
        "if hint is None or hint.order < commit.order:",
        "if hint is None or hint.order > commit.order:",
        "tests/store/test_publish.py::test_publishing_an_old_run_again_does_not_move_latest_back",
    ),
    Mutant(
        "store/commits.py",
        "return latest_commit(store)  # a commit",
        "return latest  # a commit",
        "tests/store/test_latest.py::test_a_commit_after_the_listing_is_not_lost",
    ),
    Mutant(
        "store/local.py",
        "if os.path.lexists(link) and not _was_pointed(link):",
        "if False:",
        "tests/store/test_latest.py::test_what_a_user_has_there_stays",
    ),
    Mutant(
        "store/push.py",
        "api.create_repo(repo, private=not public)",
        "api.create_repo(repo, private=public)",
        "tests/store/test_push.py::test_public_where_asked_and_from_python",
    ),
    Mutant(
        "store/push.py",
        "if additions[entry.path].upload_info.sha256.hex() != entry.sha256:",
        "if False:",
        "tests/store/test_push.py::test_a_file_that_is_not_the_manifests_is_not_uploaded",
    ),
    # report
    Mutant(
        "report/card.py",
        "if manifest.model.revision is not None:",
        "if True:",
        "tests/report/test_card.py::test_a_folder_is_no_base_model_whatever_its_name",
    ),
    Mutant(
        "report/scales.py",
        "rising = self.best > self.worst",
        "rising = True",
        "tests/report/test_scales.py::test_a_place_is_a_third_per_band_and_ends_are_ends",
    ),
    # command line
    Mutant(
        "cli/columns.py",
        "if width is not None and len(part) > 1 and _total(map(self._least, wider)) > width:",
        "if False:",
        "tests/cli/test_columns.py::test_what_does_not_fit_side_by_side_is_printed_in_parts",
    ),
    Mutant(
        "progress.py",
        "later * (spent + SETTLED_S) / (estimated + SETTLED_S)",
        "later",
        "tests/test_progress.py::test_stages_are_numbered_and_the_time_left_in_all_is_told",
    ),
    # run
    Mutant(
        "run/job.py",
        'chooses = recipe.allocation == "search" or recipe.healing',
        'chooses = recipe.allocation == "search"',
        "tests/run/stages/test_heal.py::test_healing_sees_no_held_out_row",
    ),
    Mutant(
        "run/checks.py",
        "if share < LEAST_KNOWN",
        "if share > LEAST_KNOWN",
        "tests/run/test_calibration_text.py::test_a_task_of_other_words_is_named",
    ),
    Mutant(
        "calibration/builtin_text.py",
        "[*documentation, *docstrings(), *everyday(NUM_EVERYDAY)]",
        "[*documentation, *docstrings()]",
        "tests/calibration/test_builtin_text.py::test_the_default_text_has_every_part_and_no_sentence_twice",
    ),
    # run/stages
    Mutant(
        "run/stages/generate.py",
        "return scores.float() - waiting.log()",
        "return scores.float() + waiting.log()",
        "tests/run/stages/test_generate.py::test_rows_follow_the_models_own_distribution",
    ),
    Mutant(
        "calibration/mixture.py",
        "own_rows = round(drawn * share / (1 - share))",
        "own_rows = round(drawn * share)",
        "tests/calibration/test_mixture.py::test_little_text_asks_for_little_of_the_models_own",
    ),
    Mutant(
        "run/stages/heal.py",
        "rows=text.calibration,",
        "rows=text.calibration + text.held_out,",
        "tests/run/stages/test_heal.py::test_healing_sees_no_held_out_row",
    ),
    Mutant(
        "run/stages/heal.py",
        "validation=(*text.validation, *text.own_validation) or text.held_out,",
        "validation=text.held_out,",
        "tests/run/stages/test_heal.py::test_healing_sees_no_held_out_row",
    ),
    Mutant(
        "run/stages/measure.py",
        "reserved=True",
        "reserved=False",
        "tests/run/stages/test_measure.py::test_a_measurement_has_its_host_to_itself",
    ),
    Mutant(
        "run/stages/fit.py",
        "LayerContext(ffn, inputs, norm, own_inputs)",
        "LayerContext(ffn, inputs, norm, None)",
        "tests/run/stages/test_fit.py::test_a_refit_sees_the_compressed_models_inputs",
    ),
    Mutant(
        "run/stages/fit.py",
        "output_norm=load_output_norm(checkpoint, job.plan.layer, device=device),",
        "output_norm=None,",
        "tests/run/stages/test_fit.py::test_an_error_is_taken_behind_the_familys_output_norm",
    ),
    Mutant(
        "run/stages/reduce.py",
        "parts = [result.files[0] for result in results]",
        "parts = [result.files[0] for result in results[::-1]]",
        "tests/run/stages/test_reduce.py::test_the_tree_gives_the_bytes_of_one_reduction",
    ),
    # ffn
    Mutant(
        "ffn/weights.py",
        "is_light[heavy_neurons] = False",
        "is_light[: len(heavy_neurons)] = False",
        "tests/ffn/test_weights.py::test_heavy_plus_light_equals_dense",
    ),
    # models
    Mutant(
        "models/ffns.py",
        "            found,\n            half=half,",
        "            found,\n            half=None,",
        "tests/models/test_checkpoint.py::test_the_ffns_are_found_with_their_shapes",
    ),
    Mutant(
        "models/structure.py",
        "    if left:\n",
        "    if False:\n",
        "tests/models/test_structure.py::test_what_has_the_shape_of_an_ffn_and_is_part_of_none_is_refused",
    ),
    Mutant(
        "models/selection.py",
        "if not is_chosen(ffn)]",
        "if False]",
        "tests/models/test_selection.py::test_bad_patterns_are_one_line",
    ),
    # calibration
    Mutant(
        "calibration/sampling.py",
        "calibration = shuffled[size : size + num_samples] if is_disjoint else shuffled",
        "calibration = shuffled[:num_samples]",
        "tests/calibration/test_sampling.py::test_a_sample_is_a_split_of_the_distinct_texts",
    ),
    Mutant(
        "calibration/statistics.py",
        "max_abs=np.maximum(self.max_abs, other.max_abs),",
        "max_abs=self.max_abs,",
        "tests/calibration/test_statistics.py::test_merging_in_any_order_gives_exact_counts_and_sums_to_1e_12",
    ),
    # compressors
    Mutant(
        "compressors/base.py",
        "torch.cat([*(self.own_inputs or ()), *self.inputs])",
        "torch.cat([*self.inputs])",
        "tests/compressors/test_distill.py::test_own_inputs_are_fitted_beside_the_originals",
    ),
    Mutant(
        "compressors/least_squares.py",
        "add_product_(cross, a_TN, y_TD - ffn(x_TD))",
        "add_product_(cross, a_TN, y_TD)",
        "tests/compressors/test_prune.py::test_a_refit_solves_the_ridge_problem_it_documents",
    ),
    # splitting
    Mutant(
        "splitting/scores.py",
        'order = np.argsort(-scores, kind="stable")',
        'order = np.argsort(scores, kind="stable")',
        "tests/splitting/test_scores.py::test_top_neurons_are_ascending_and_none_left_out_is_higher",
    ),
    Mutant(
        "splitting/scores.py",
        "key=lambda index: -router_weighted_norm(statistics[index])",
        "key=lambda index: router_weighted_norm(statistics[index])",
        "tests/splitting/test_experts.py::test_the_lowest_scores_of_each_block_are_dropped",
    ),
    # calibration
    Mutant(
        "calibration/hooks.py",
        "(pairs.weights * is_chosen_TK)[rows].sum(1)",
        "pairs.weights[rows].sum(1)",
        "tests/calibration/test_experts.py::test_the_weighted_norm_is_that_of_what_each_expert_contributes",
    ),
    # healing
    Mutant(
        "healing/loop.py",
        "for name, tensor in state.best.items():",
        "for name, tensor in list(state.best.items())[:0]:",
        "tests/healing/test_heal.py::test_a_hopeless_learning_rate_returns_the_model_it_was_given",
    ),
    # runtime
    Mutant(
        "runtime/trial.py",
        "            _reverse_neurons(block, ffn)",
        "            pass",
        "tests/runtime/test_narrowed_channels.py::test_the_trial_exchanges_neurons",
    ),
    Mutant(
        "runtime/trial.py",
        "raise UnsupportedModelError(not_run(missed))",
        "pass",
        "tests/runtime/test_trial.py::test_an_ffn_that_no_row_reaches_is_named_with_how_to_leave_it_out",
    ),
    Mutant(
        "runtime/plugin.py",
        "activation = block.get_submodule(paths.activation)",
        'activation = ACT2FN["gelu"]',
        "tests/runtime/test_trained_activation.py::test_every_form_of_result_keeps_them",
    ),
    Mutant(
        "runtime/ffn_tensors.py",
        "if ffn.paths.output_norm is None:",
        "if ffn.paths.output_norm or True:",
        "tests/runtime/test_ffn_tensors.py::test_a_block_that_normalises_last_gives_the_norm_of_its_ffns_sum",
    ),
    Mutant(
        "runtime/assemble.py",
        "kept_rows = routing_of(checkpoint).kept_rows(layouts)",
        "kept_rows = routing_of(checkpoint).kept_rows(sorted(layouts, key=lambda each: each.is_dropped))",
        "tests/test_experts.py::test_the_result_is_the_dense_model_with_its_router_closed",
    ),
    # measurement
    Mutant(
        "measurement/gates.py",
        "met = low is not None and low >= gate.limit",
        "met = low is not None and high is not None and high >= gate.limit",
        "tests/measurement/test_gates.py::test_a_limit_within_the_noise_is_undecided",
    ),
    # distributed
    Mutant(
        "distributed/dispatch.py",
        "stage_items.put_back(lost, event)",
        "stage_items.num_left -= 1",
        "tests/distributed/test_dispatch.py::test_a_lost_worker_costs_the_item_in_hand",
    ),
    Mutant(
        "distributed/ray_runner.py",
        "presence = 1.0 if reserved else A_LITTLE",
        "presence = A_LITTLE",
        "tests/distributed/test_ray_runner.py::test_what_is_measured_shares_its_node_with_nobody",
    ),
    # report
    Mutant(
        "report/humanize.py",
        'text = f"{math.floor(abs(value) * 1e4) / 1e4:.4f}"',
        'text = f"{abs(value):.4f}"',
        "tests/report/test_humanize.py::test_number",
    ),
    # zoo
    Mutant(
        "zoo/attempts.py",
        "if self._ran_out is None and ended.is_out_of_memory:",
        "if False:",
        "tests/zoo/test_attempts.py::test_it_is_tried_once_more_whatever_retries_are",
    ),
    Mutant(
        "measurement/regressions.py",
        "_timed_on(new) != _timed_on(current)",
        "False",
        "tests/measurement/test_regressions.py::test_speed_on_two_kinds_of_hardware_is_not_compared",
    ),
    Mutant(
        "distributed/observing.py",
        "check_alike(self.versions)",
        "pass",
        "tests/distributed/test_alike.py::test_a_worker_that_joins_with_another_version_does_nothing",
    ),
    Mutant(
        "zoo/turns.py",
        "has_ended = number == 0 or",
        "has_ended = True or",
        "tests/zoo/test_turns.py::test_who_waits_says_for_whom",
    ),
    Mutant(
        "zoo/batch.py",
        "now = max(now, before + timedelta(seconds=1))",
        "pass",
        "tests/zoo/test_turns.py::test_names_of_one_second_are_in_order",
    ),
    Mutant(
        "store/scratch.py",
        "return abs(now - entry.modified_at) <= LEASE",
        "return now - entry.modified_at <= LEASE",
        "tests/store/test_leases.py::test_who_was_killed_holds_nothing_once_the_lease_is_over",
    ),
    Mutant(
        "zoo/batch.py",
        'return REFUSED if self.count("refused") or self.moved("refused") else DONE',
        "return DONE",
        "tests/zoo/test_page.py::test_the_exit_code_says_the_worst",
    ),
    # recipes
    Mutant(
        "recipes/recipe.py",
        "if len(self._rules()) != 1:",
        "if len(self._rules()) > 1:",
        "tests/recipes/test_recipe.py::test_a_bad_value_is_named",
    ),
    # cli
    Mutant(
        "cli/commands.py",
        "return DONE if report.ok else FAILED",
        "return 0",
        "tests/cli/test_entry.py::test_verify_names_what_is_wrong",
    ),
)


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mutant in it. Raises ValueError where it does not have the old text once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def verdict(mutant: Mutant) -> str:
    """What became of a mutant: "caught", or why not."""
    with TemporaryDirectory(prefix="ffsplit-mutant-") as name:
        folder = _copy(Path(name))
        file = folder / "ffsplit" / mutant.file
        try:
            file.write_text(mutated(mutant, file.read_text("utf-8")), "utf-8")
        except ValueError as error:
            return str(error)
        code, out = _test(folder, mutant.test)
    if code == FAILED:
        return "caught"
    return "SURVIVES" if code == 0 else f"{mutant.test} did not run (pytest: {code})\n{out[-2000:]}"


def _copy(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def _test(folder: Path, *tests: str) -> tuple[int, str]:
    """pytest's exit code for these tests of the fast set, and what it printed."""
    out = folder / "out.txt"
    process = FORK.Process(target=_run_pytest, args=(folder, out, tests))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, out.read_text("utf-8", "replace")


def _run_pytest(folder: Path, out: Path, tests: Sequence[str]) -> None:
    """In a process of its own, which has the libraries from its parent and our modules from a folder."""
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(each for each in sys.path if each not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ffsplit", "tests")]:
        del sys.modules[name]
    flags = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", str(folder / "temporary")]
    sys.exit(pytest.main([*flags, *tests]))


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    with TemporaryDirectory(prefix="ffsplit-mutant-") as name:
        code, out = _test(_copy(Path(name)), *dict.fromkeys(mutant.test for mutant in MUTANTS))
    if code != 0:
        print(out)
        print("the tests fail without a mutant", file=sys.stderr)
        return 1
    survivors = 0
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for mutant, found in zip(MUTANTS, pool.map(verdict, MUTANTS), strict=True):
            survivors += found != "caught"
            print(f"{found}: {mutant.file}: {mutant.new.splitlines()[0]}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
