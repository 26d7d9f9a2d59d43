"""Loading from a folder, the local cache or the Hugging Face hub, without hanging where there is no network."""
import os
import urllib.error
import urllib.request

from huggingface_hub import constants


def load(name: str, from_pretrained):
    """from_pretrained(local_files_only=True), from a folder or the cache, else from the hub if it answers.

    OSError with one line where neither works; a folder is never looked for on the hub.
    """
    try:
        return from_pretrained(local_files_only=True)
    except Exception as error:                               # OSError, ValueError, and each library's own types
        if os.path.isdir(name):
            raise OSError(f"the folder '{name}' holds nothing that loads: {one_line(error)}") from error
    if not reachable():
        raise OSError(f"'{name}' is not on this machine and the hub cannot be reached")
    try:
        return from_pretrained(local_files_only=False)
    except Exception as error:
        raise OSError(f"'{name}' is not on this machine and could not be downloaded: {one_line(error)}") from error


def reachable(timeout: float = 5.0) -> bool:
    """Whether the hub (HF_ENDPOINT) takes a request within `timeout` seconds; its own client would retry for 46 s."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout)
    except urllib.error.HTTPError:                           # an answer, whatever it says
        return True
    except (OSError, ValueError):
        return False
    return True


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
