"""What libraries may say in our terminal: errors."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("library", ["torchao", "gptqmodel"])
def test_an_extra_that_is_installed_greets_nobody(library, tmp_path):
    pytest.importorskip(library)
    code = (
        "from qlora_trainer.system.quiet import quiet_gptqmodel, quiet_libraries\n"
        "quiet_libraries()\n"
        "quiet_gptqmodel()\n"
        f"import peft, {library}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).strip() == ""
