"""The tiny models and directories of the deploy tests."""

import importlib.util
from pathlib import Path

path = Path(__file__).parents[1] / "deploy" / "conftest.py"
spec = importlib.util.spec_from_file_location("deploy_conftest", path)
assert spec is not None and spec.loader is not None
deploy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deploy)

trained, tokenizer = deploy.trained, deploy.tokenizer
pristine, packed = deploy.pristine, deploy.packed
