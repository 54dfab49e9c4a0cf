"""The hub that pushes are tested against answers huggingface_hub's own client as the real one does."""

import pytest
from fake_hub import COMMIT, FakeHub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

TOKEN = "hf_" + "PushesToLoopback"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with FakeHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("ann/mine", private=True)
    return api


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "weights.safetensors").write_bytes(bytes(range(256)) * 100)
    (made / "deep/config.json").write_text("{}")
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    return made


def puts(hub) -> int:
    return sum(request.startswith("PUT ") for request in hub.requests)


def test_a_folder_is_pushed_listed_and_fetched(hub, api, folder, tmp_path):
    assert hub.private == {"ann/mine": True} and api.repo_info("ann/mine").private
    found = api.upload_folder(folder_path=folder, repo_id="ann/mine")
    assert found.oid == api.repo_info("ann/mine").sha != COMMIT
    files = {"README.md", "deep/config.json", "weights.safetensors"}
    assert set(api.list_repo_files("ann/mine")) == files
    [entry] = api.get_paths_info("ann/mine", ["weights.safetensors"])
    assert entry.lfs.size == 25600 and puts(hub) == 1
    for name in files:
        got = api.hf_hub_download("ann/mine", name, cache_dir=tmp_path / "cache")
        assert open(got, "rb").read() == (folder / name).read_bytes()
    assert not any(TOKEN.encode() in received for received in hub.received)


def test_what_is_there_is_not_sent_again(hub, api, folder):
    before = api.upload_folder(folder_path=folder, repo_id="ann/mine").oid
    assert api.upload_folder(folder_path=folder, repo_id="ann/mine").oid == before
    (folder / "copy.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    assert api.upload_folder(folder_path=folder, repo_id="ann/mine").oid != before
    assert puts(hub) == 1


def test_a_repository_is_made_once(api):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("ann/mine")
    api.create_repo("ann/mine", exist_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("ann/other")


def test_a_commit_on_what_is_no_longer_there_is_refused(api):
    first = api.create_commit("ann/mine", [CommitOperationAdd("a.txt", b"a")], commit_message="a")
    api.create_commit("ann/mine", [CommitOperationAdd("b.txt", b"b")], commit_message="b", parent_commit=first.oid)
    late = [CommitOperationAdd("c.txt", b"c"), CommitOperationDelete("a.txt")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("ann/mine", late, commit_message="c", parent_commit=first.oid)
    assert api.list_repo_files("ann/mine") == ["a.txt", "b.txt"]
    late = [CommitOperationAdd("c.txt", b"c"), CommitOperationDelete("a.txt")]
    api.create_commit("ann/mine", late, commit_message="c")
    assert api.list_repo_files("ann/mine") == ["b.txt", "c.txt"]


def test_a_pull_request_leaves_main_as_it_is(api):
    asked = api.create_commit("ann/mine", [CommitOperationAdd("a.txt", b"a")], commit_message="a", create_pr=True)
    assert (asked.pr_num, asked.pr_revision) == (1, "refs/pr/1")
    assert api.list_repo_files("ann/mine") == []
    assert api.list_repo_files("ann/mine", revision="refs/pr/1") == ["a.txt"]


def test_without_a_token_nothing_is_taken(hub, api):
    stranger = HfApi(endpoint=hub.url, token=False)
    for call in (
        lambda: stranger.create_repo("ann/theirs"),
        lambda: stranger.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="ann/mine"),
    ):
        with pytest.raises(HfHubHTTPError, match="401"):
            call()
    assert api.list_repo_files("ann/mine") == []


def test_a_commit_is_taken_with_its_objects_or_not_at_all(hub, api, folder):
    """As when a push is killed between its objects and its commit, and an object has gone meanwhile."""
    weights = CommitOperationAdd("weights.safetensors", folder / "weights.safetensors")
    api.preupload_lfs_files("ann/mine", [weights], free_memory=False)
    assert api.list_repo_files("ann/mine") == []
    hub.object(weights.upload_info.sha256.hex()).write_bytes(b"cut")
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.create_commit("ann/mine", [CommitOperationAdd("a.txt", b"a"), weights], commit_message="b")
    assert api.list_repo_files("ann/mine") == []
