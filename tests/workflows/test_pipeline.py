"""pipeline.yml executed, from a push to the promoted tag, and with every defect planted that it exists to stop."""

import json
import re

from tests.image.conftest import PASSWORD
from tests.workflows.conftest import Account, Fork, Promotion, Ran, commit, forget_images

LARGE = 20_000_000
"""Bytes of a layer that no edited answer may send again."""
BUILT = ("uploaded weights", "uploaded embedder", "uploaded answers", "uploaded verdicts")
PUSHING = {"image/verify", "image/promote"}
ALL_JOBS = {"doctor", "plan", "weights/quantize", "cache/certify", "gates/judge", "image/build", "pipeline", *PUSHING}


def test_a_fresh_fork_without_a_secret_is_green_and_pushes_nothing(built: tuple[Fork, Ran], account: Account) -> None:
    fresh, ran = built
    ran.require_green()
    assert ran.jobs.keys() == ALL_JOBS - PUSHING
    assert account.tags() == {}
    assert "logged in" not in fresh.log()
    for name in ("DOCKERHUB_TOKEN", "DOCKERHUB_USERNAME", "HF_TOKEN"):
        assert re.search(rf"not set \| (secret|variable) `{name}`", ran.log)
    assert "Emerald: all gates passed" in ran.log


def test_a_push_promotes_the_digest_that_was_verified(promoted: Promotion, account: Account) -> None:
    assert promoted.ran.jobs.keys() == ALL_JOBS
    attested = [json.loads(line) for line in promoted.fork.lines("attested")]
    assert {one["subject"] for one in attested} == {f"{account.repository}@{promoted.digest}"}
    assert [one["type"] for one in attested] == [
        "https://github.com/nektos/act/verdicts/v1", "https://spdx.dev/Document/v2.3", "https://slsa.dev/provenance/v1",
    ]  # fmt: skip
    verdicts = json.dumps(attested[0]["predicate"])
    assert all(gate in verdicts for gate in ("quality", "replies", "latency", "cache", "image"))
    assert promoted.fork.lines("signed") == [f"sign --yes {account.repository}@{promoted.digest}"]
    assert "uploaded weights" not in "\n".join(promoted.fork.log())


def test_the_same_push_again_builds_and_uploads_nothing_new(promoted: Promotion, fork: Fork, account: Account) -> None:
    ran = fork.run()
    ran.require_green()
    assert account.tags()["latest"] == promoted.digest
    assert not [line for line in fork.log() if line.startswith(BUILT)]
    assert re.search(r"\b0 layers pushed, \d+ were there", ran.log)


def test_a_machine_that_never_saw_the_image_pushes_no_layer_again(
    promoted: Promotion, fork: Fork, account: Account
) -> None:
    """As every runner is: without images, build steps, or knowledge of what registries have."""
    forget_images()
    ran = fork.run()
    ran.require_green()
    assert re.search(r"\b0 layers pushed, \d+ were there", ran.log)
    assert account.layers(account.tags()["latest"]) == account.layers(promoted.digest)


def test_an_edited_answer_gets_a_new_image_and_no_new_weights(
    promoted: Promotion, fork: Fork, account: Account
) -> None:
    edit_an_answer(fork)
    ran = fork.run()
    ran.require_green()
    said = "\n".join(fork.log())
    assert "downloaded weights" in said and "uploaded weights" not in said
    assert "downloaded embedder" in said and "uploaded embedder" not in said
    assert "uploaded answers" in said
    assert re.search(r"\bbuild_cache: ", ran.log)
    assert not re.search(r"\b(quantize|export|train_embedder|export_embedder): ", ran.log)
    after = account.tags()["latest"]
    assert after != promoted.digest
    large = {digest for digest, size in account.layers(promoted.digest).items() if size > LARGE}
    assert len(large) >= 3  # weights, embedder, Python packages
    assert large <= account.layers(after).keys()


def test_damaged_weights_are_made_and_kept_anew(fork: Fork) -> None:
    """What an earlier run has kept is not what it wrote."""
    kept = fork.current("weights", "gate_quality", "export")
    report = kept / "reports/quality.json"
    report.write_text(report.read_text(encoding="utf-8") + " ", encoding="utf-8")
    ran = fork.run()
    ran.require_green()
    assert re.search(r"\bgate_quality: ", ran.log)
    assert f"uploaded {kept.name}" in fork.log()
    assert len(list(fork.store.glob(f"artifacts/*/{kept.name}"))) == 2


def edit_an_answer(fork: Fork) -> None:
    here, there = "and we shall begin there.", "and we shall begin there, or a little way before it."
    fork.edit("cache_data/entries/app.yaml", here, there)


def edit_the_server(fork: Fork) -> None:
    """What no engine and no certificate depends on."""
    fork.edit("serving/app.py", '"""The HTTP interface', '"""This HTTP interface')


def test_bad_weights_stop_it(fork: Fork, account: Account) -> None:
    """Rounded by a recipe that is too coarse for this model."""
    before = account.tags()
    settings = "quantize.method=search; quantize.scheme=int4-channel"
    ran = fork.run("workflow_dispatch", {"settings": settings, "config": "embedded", "push": "true", "tag": "latest"})
    ran.require_red("weights/quantize")
    assert "gate gate_quality failed: mean KL divergence" in ran.log
    assert account.tags() == before


def test_a_slow_program_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    layer = "            x_TD = self._model.layer(index, x_TD, place, cache)\n"
    fork.edit("model/engine.py", layer, layer + "            __import__('time').sleep(0.01)\n")
    ran = fork.run()
    ran.require_red("gates/judge")
    assert "gate gate_latency failed: decode speedup" in ran.log
    assert account.tags() == before


FORGE = """      - name: Forge the certificate
        run: |
          sed -i 's/"risk": 0.02/"risk": 0.03/' "$EMERALD_TEST_STORE"/artifacts/*/answers-*/certificate.json
"""


def test_a_forged_certificate_stops_it(fork: Fork, account: Account) -> None:
    """One digit of the kept certificate is another, between the job that made it and those that read it."""
    before = account.tags()
    workflow = fork.tree / ".github/workflows/cache.yml"
    workflow.write_text(workflow.read_text(encoding="utf-8") + FORGE, encoding="utf-8")
    commit(fork.tree, "Forge the certificate")
    ran = fork.run()
    ran.require_red("gates/judge")
    assert "certify_cache is out of date: output certificate.json is missing or not what this stage wrote" in ran.log
    assert account.tags() == before


def test_a_stale_certificate_is_made_anew(promoted: Promotion, fork: Fork, account: Account) -> None:
    """What was certified before an answer was edited is kept under the name of what it is now."""
    kept = fork.current("answers", "certify_cache")
    edit_an_answer(fork)
    name = fork.name("answers", "certify_cache")
    kept.rename(kept.with_name(name))
    ran = fork.run()
    ran.require_green()
    assert "build_cache is out of date" in ran.log
    assert f"uploaded {name}" in fork.log()
    assert account.tags()["latest"] != promoted.digest


def test_what_has_expired_is_built_again(promoted: Promotion, fork: Fork, account: Account) -> None:
    """Answers alone, as after a setting of the repository; a deployment of them says what to run."""
    for prefix in ("answers", "embedder", "verdicts"):
        fork.expire(prefix)
    fork.variables |= {
        "AWS_ROLE": "role",
        "AWS_REGION": "region",
        "EMERALD_API_KEYS": "public",
        "EMERALD_CPU": "aarch64",
    }
    assert re.search(r"no run keeps (weights|answers)-\w+: run the workflow pipeline, which makes it", refused(fork))
    fork.variables["EMERALD_CPU"] = "native"
    ran = fork.run()
    ran.require_green()
    said = "\n".join(fork.log())
    assert "uploaded answers" in said and "uploaded embedder" in said and "uploaded weights" not in said
    assert "was trained on just this: no training" in ran.log


def test_an_image_that_is_never_healthy_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    start = 'ENTRYPOINT ["tini"'
    fork.edit("Dockerfile", start, f"HEALTHCHECK --interval=1s --start-period=1s --retries=1 CMD false\n{start}")
    ran = fork.run()
    ran.require_red("image/build")
    assert "health check: unhealthy" in ran.log
    assert account.tags() == before


def test_another_digest_between_push_and_promotion_stops_it(promoted: Promotion, fork: Fork, account: Account) -> None:
    before = account.tags()["latest"]
    fork.edit(
        ".github/workflows/image.yml",
        'image verify "$REPOSITORY@$DIGEST"',
        f'image verify "$REPOSITORY@{promoted.digest}"',
    )
    edit_the_server(fork)
    ran = fork.run()
    ran.require_red("image/promote")
    assert account.tags()["latest"] == before
    assert fork.lines("attested") == fork.lines("signed") == []


def test_a_missing_licence_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    fork.edit("Dockerfile", "WORKDIR /emerald\n", "RUN rm -rf /emerald/licences\nWORKDIR /emerald\n")
    ran = fork.run()
    ran.require_red("image/build")
    assert "missing of what the model's licence asks for" in ran.log
    assert account.tags() == before


def test_a_vulnerability_that_a_rebuild_mends_stops_it(fork: Fork, account: Account) -> None:
    """And those that it cannot mend, which every other run here meets, are told of and stop nothing."""
    before = account.tags()
    fork.scanned("grype.json")
    ran = fork.run()
    ran.require_red("image/build")
    assert account.tags() == before


def test_a_list_that_is_too_large_to_attest_is_refused_before_the_push(fork: Fork, account: Account) -> None:
    before = account.registry.tags()
    check = ".venv/bin/python -m pipeline.image.sbom sbom.spdx.json"
    padded = f"head --bytes 17M /dev/zero | tr '\\0' ' ' >>sbom.spdx.json && {check}"
    fork.edit(".github/workflows/image.yml", f"run: {check}", f"run: {padded}")
    fork.run().require_red("image/build")
    assert account.registry.tags() == before


def test_a_private_fork_is_green_and_writes_its_name_nowhere(fork: Fork, account: Account) -> None:
    """Attesting is refused there without a paid plan, and the log of keyless signatures is public."""
    fork.private = True
    ran = fork.run()
    ran.require_green()
    assert fork.lines("attested") == fork.lines("signed") == fork.lines("public-log") == []
    assert "Nothing is attested" in ran.log and "The image is not signed" in ran.log


def test_a_limit_of_requests_is_waited_for(fork: Fork, account: Account) -> None:
    """Runners share addresses, and a registry's limit with all who use them."""
    forget_images()
    account.front.limited = 2
    fork.run().require_green()
    assert account.front.limited == 0


def test_an_older_run_does_not_replace_what_a_newer_one_promoted(
    promoted: Promotion, fork: Fork, account: Account
) -> None:
    """The newer one, of another group of concurrent runs, was faster."""
    before = account.tags()["latest"]
    account.record("latest-promoted-0999-{}-r9999999999", before)
    edit_the_server(fork)
    ran = fork.run()
    account.forget("latest-promoted-0999")
    ran.require_green()
    assert account.tags()["latest"] == before
    assert "A newer run has promoted another image, which stays" in ran.log or "not promoted" in ran.log


def test_a_skipped_gate_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    fork.edit(
        ".github/workflows/pipeline.yml",
        "    needs: [plan, weights, cache]\n",
        "    needs: [plan, weights, cache]\n    if: false\n",
    )
    ran = fork.run()
    ran.require_red()
    assert "job gates: skipped" in ran.log and "job image: skipped" in ran.log
    assert account.tags() == before


def test_a_gate_that_was_cut_short_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    fork.variables["EMERALD_SETTINGS"] = "gate_latency.repetitions=8"  # on which there is no verdict yet
    fork.edit(
        ".github/workflows/gates.yml",
        "run: .venv/bin/python -m pipeline run report",
        "run: timeout --signal INT 10 .venv/bin/python -m pipeline run report",
    )
    ran = fork.run()
    ran.require_red("gates/judge")
    assert "stopped; finished stages are kept" in ran.log
    assert account.tags() == before


def test_a_runner_without_the_features_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    fork.variables["EMERALD_CPU"] = "aarch64+bf16+i8mm"
    ran = fork.run()
    ran.require_red("weights/quantize", "cache/certify")
    assert "cannot run programs for aarch64+bf16+i8mm" in ran.log
    assert account.tags() == before


def test_a_wrong_password_stops_it(fork: Fork, account: Account) -> None:
    before = account.tags()
    fork.secrets["DOCKERHUB_TOKEN"] = "wrong"
    ran = fork.run()
    ran.require_red("doctor")  # before anything is built
    assert "refuses the user 'anne' with this token" in ran.log
    assert account.tags() == before


def test_rolling_back_is_one_dispatch(promoted: Promotion, fork: Fork, account: Account) -> None:
    first = account.tags()["latest"]
    edit_the_server(fork)
    fork.run().require_green()
    assert account.tags()["latest"] != first
    ran = fork.run("workflow_dispatch", {"tag": "latest", "digest": ""}, workflow="promote.yml")
    ran.require_green()
    assert account.tags()["latest"] == first


def test_the_canary_is_silent_before_anything_was_promoted(
    built: tuple[Fork, Ran], fork: Fork, account: Account
) -> None:
    """A registry says of an unknown repository what it says of a private one; and EMERALD_IMAGE is enough to look."""
    fork.variables = {"EMERALD_IMAGE": f"{account.repository}-of-nobody"}
    fork.secrets = {}
    ran = fork.run("schedule", workflow="monitor.yml")
    ran.require_green()
    assert "Nothing was promoted" in ran.log
    assert fork.issues == []


def test_the_canary_reports_a_registry_that_lost_a_layer_until_it_has_it_again(
    promoted: Promotion, fork: Fork, account: Account
) -> None:
    """As it runs every day, on a machine that never saw the image. This registry asks for a password to read, too."""

    def sing() -> Ran:
        forget_images()
        return fork.run("schedule", workflow="monitor.yml")

    sing().require_green()
    assert fork.issues == []
    layers = account.layers(account.tags()["latest"])
    with account.without(max(layers, key=layers.__getitem__)):
        assert sing().jobs == {"monitor/canary": False}
    (issue,) = fork.issues
    assert issue["state"] == "open" and issue["labels"] == ["canary"]
    assert "came to no verdict" in issue["body"]
    sing().require_green()
    assert issue["state"] == "closed"


def test_the_weekly_scan_opens_one_issue_of_what_can_be_mended(
    promoted: Promotion, fork: Fork, account: Account
) -> None:
    for report, state in (("grype.json", "open"), ("grype-unfixable.json", "closed")):
        fork.scanned(report)
        fork.run("schedule", workflow="scan.yml")
        (issue,) = fork.issues
        assert issue["state"] == state and issue["labels"] == ["vulnerabilities"]


def test_a_deployment_says_what_it_lacks_before_it_builds(fork: Fork) -> None:
    """The rest of it takes an Arm machine and an AWS account."""
    for name, value in (("AWS_ROLE", "role"), ("AWS_REGION", "region"), ("EMERALD_API_KEYS", "digest")):
        assert f"set the variable {name}: see deploy/lambda/README.md" in refused(fork)
        fork.variables[name] = value
    assert "EMERALD_CPU is native, and Lambda runs aarch64 alone" in refused(fork)


def refused(fork: Fork) -> str:
    """What a deployment said that did not begin."""
    inputs = {"config": "embedded", "stack": "emerald", "repository": "emerald", "url": "iam"}
    ran = fork.run("workflow_dispatch", inputs, workflow="deploy-lambda.yml")
    assert ran.jobs == {"deploy-lambda/deploy": False}
    return ran.log


SPY = """.PHONY: setup lint lint-workflows pipeline test test-image image
setup lint lint-workflows pipeline test test-image image:
	@env >>$(EMERALD_TEST_STORE)/seen; cat .git/config >>$(EMERALD_TEST_STORE)/seen
	@mkdir -p build/embedded/reports; touch build/embedded/reports/summary.md
"""
"""What a pull request may bring along: its own commands, which look for what they can take."""


def test_a_pull_request_sees_no_secret_and_pushes_nothing(fork: Fork, account: Account) -> None:
    before = account.tags()
    (fork.tree / "Makefile").write_text(SPY)
    commit(fork.tree, "Look around")
    assert fork.workflows("pull_request") == {"check.yml"}
    fork.run("pull_request", workflow="check.yml").require_green()
    seen = "\n".join(fork.lines("seen"))
    assert seen.count("EMERALD_TEST_STORE=") >= 6  # it did look, in every job
    assert PASSWORD not in seen
    assert "logged in" not in fork.log()
    assert account.tags() == before
