"""AOTInductor: a model that is compiled ahead of time, to a shared library, computes as eager torch does."""

import pytest
import torch
from test_export import BATCH_AND_LENGTH, IDS, OTHERS, small

pytestmark = [  # torch's own, of what it unpickles and of a module that its compiler imports
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]


@pytest.mark.parametrize(
    "how", [pytest.param("unmerged", marks=pytest.mark.slow), pytest.param("merged", marks=pytest.mark.exhaustive)]
)
def test_a_compiled_package_is_the_model_for_any_batch_and_length(how, tmp_path):
    model = small(how, torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), dynamic_shapes=BATCH_AND_LENGTH)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for ids in (IDS, OTHERS):
            torch.testing.assert_close(run(ids), model(ids))
