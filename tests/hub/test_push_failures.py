"""A push that fails says why and leaves the repository as it was; one that succeeds has arrived whole."""

import socket

import pytest
from huggingface_hub import constants

from factories import tiny_model, tiny_processor
from sim_hf.hub import HubError, coco_dataset, push_dataset, push_model
from sim_hf.hub.allowed_files import MODEL_FILES
from sim_hf.hub.repository import HubRepository

OLD = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"old 1", "model-00002-of-00002.safetensors": b"old 2"}
NEW = {"README.md": b"# new\n", "config.json": b'{"new": true}', "model.safetensors": b"new", "vocab.json": b"[]"}
NUM_REQUESTS = 12  # more than a push makes


def push(files, **options):
    return HubRepository("ann/model", **options).commit(files, "push", replaces=MODEL_FILES)


def content(hub, revision="main"):
    files = hub.files("ann/model", revision=revision)
    return {name: file for name, file in files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("moment", ["before", "after", "500"])
@pytest.mark.parametrize("times", [1, 1_000_000], ids=["once", "for good"])
def test_a_connection_that_breaks_leaves_the_old_state_or_the_new_one(hub, moment, times):
    """At every request in turn; and a push that reports success has arrived, one that reports that nothing did has not."""
    outcomes = set()
    for number in range(NUM_REQUESTS):
        hub.repos.clear(), hub.blobs.clear()
        push(OLD)
        hub.fail_from(number, moment, times)
        try:
            push(NEW)
            outcome, reason = "pushed", ""
        except HubError as error:
            outcome, reason = "failed", str(error)
        hub.count_down[0] = -(2**30)
        found = content(hub)
        assert found in (OLD, NEW), f"request {number}: mixed"
        assert found == NEW if outcome == "pushed" else "cannot be asked" in reason or found == OLD, f"request {number}: {reason}"
        outcomes.add(outcome)
        push(NEW)  # again, and it is done
        assert content(hub) == NEW
    assert "pushed" in outcomes and (times == 1 or "failed" in outcomes)


def test_a_push_whose_answer_is_lost_counts_as_what_it_is(hub):
    push(OLD)
    hub.fail("POST", "/commit/", "after", times=1)
    assert push(NEW).oid == hub.head("ann/model")
    assert content(hub) == NEW


def test_of_two_pushes_at_once_the_later_one_is_told(hub, monkeypatch):
    push(OLD)
    mine = HubRepository("ann/model")
    create = mine.api.create_commit

    def late(*arguments, **options):
        push(NEW)
        return create(*arguments, **options)

    monkeypatch.setattr(mine.api, "create_commit", late)
    with pytest.raises(HubError, match=r"changed by somebody else at the same time \(412\): push again\. Nothing of this push"):
        mine.commit({**NEW, "model.safetensors": b"mine"}, "push", replaces=MODEL_FILES)
    assert content(hub) == NEW


def test_a_branch_of_its_own_leaves_the_main_one_alone(hub):
    push(OLD)
    push(NEW, revision="try/new")
    assert content(hub) == OLD and content(hub, "try/new") == NEW


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no access token .*hf auth login"),
        ("hf_wrong", r"does not know this access token \(401\)"),
        ("hf_reader", r"may not write to ann/model \(403\)"),
        ("hf_other", r"may not write to ann/model \(403\)"),
    ],
)
def test_a_token_that_may_not_write_is_named(hub, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        push(NEW)
    assert not hub.repos


def test_a_token_that_may_only_read_cannot_change_what_is_there(hub, monkeypatch):
    push(OLD)
    for token in ("hf_reader", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=r"may not write to ann/model \(403\)"):
            push(NEW)
    assert content(hub) == OLD


def test_no_network_is_named(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(HubError, match=f"{nowhere} cannot be reached: ConnectError"):
        push(NEW)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(NEW)


@pytest.mark.parametrize("name", ["model", "ann/model/extra", "ann/", "../model", ""])
def test_a_name_that_is_none_is_refused_before_anything_else(name):
    with pytest.raises(ValueError, match="owner/name"):
        HubRepository(name)


def test_a_text_that_holds_a_token_is_not_pushed(hub):
    push(OLD)
    for secret in ("hf_" + "aB3" * 12, "ghp_" + "x" * 36, "AKIA" + "A1" * 8):
        with pytest.raises(ValueError, match=r"README\.md holds what looks like an access token; nothing was pushed"):
            push({**NEW, "README.md": f"token: {secret}".encode()})
    assert content(hub) == OLD


def test_a_card_that_the_hub_refuses_changes_nothing(hub):
    push(OLD)
    with pytest.raises(ValueError, match="pipeline_tag"):
        push({**NEW, "README.md": b"---\npipeline_tag: magic\n---\n"})
    assert content(hub) == OLD


def test_weights_whose_upload_breaks_leave_the_model_as_it_was(hub, run, tmp_path):
    push_model(run, "ann/model")
    before = hub.files("ann/model")
    tiny_model(seed=1).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    hub.fail("PUT", "/lfs/", "before")
    with pytest.raises(HubError, match=r"cannot be reached: .*Nothing of this push is in ann/model"):
        push_model(tmp_path, "ann/model")
    assert hub.files("ann/model") == before


def test_a_data_set_whose_upload_breaks_stays_as_it_was(hub, shapes, tmp_path, monkeypatch):
    rows = coco_dataset(shapes / "images", shapes / "instances_train.json", cache_dir=tmp_path)
    push_dataset({"train": rows}, "ann/boxes")
    before = hub.files("ann/boxes", "datasets")
    monkeypatch.setattr("sim_hf.hub.dataset.SHARD_BYTES", 500)
    hub.blobs.clear()
    hub.fail_from(10, "before", 1_000_000)  # some shards are there by then
    with pytest.raises(HubError):
        push_dataset({"train": rows}, "ann/boxes")
    assert hub.files("ann/boxes", "datasets") == before
