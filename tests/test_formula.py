"""The formula itself: if it were off, every other golden test would fail for the wrong reason."""
import pytest
import torch
from formula import assert_close, bits, given, golden, model, parts, uniform, weight

VECTORS = golden("formula_vectors.json")
WEIGHTS = golden("weights_check.json") | golden("temporal/extra_weights_check.json")
INPUTS = {name: check for path in ("image/results.json", "temporal/temporal.json", "samplers/samplers.json")
          for name, check in golden(path)["inputs"].items()}
POSITION_IDS = "clip_image_encoder.vision_model.embeddings.position_ids"     # integers, and not in our model


def assert_looks_like(tensor, check):
    """Shape, first three values and sum, as they were printed to eight digits."""
    assert list(tensor.shape) == check["shape"]
    assert tensor.flatten()[:3].tolist() == pytest.approx(check["first3"], rel=1e-7)
    if "sum" in check:
        assert tensor.double().sum().item() == pytest.approx(check["sum"], rel=1e-7, abs=1e-9 * tensor.numel())


@pytest.mark.parametrize("name", VECTORS)
def test_random_bits_of_a_name_are_the_recorded_ones(name):
    assert [str(raw) for raw in bits(name, 4)] == VECTORS[name]["raw_first4"]
    assert uniform(name, (4,)).tolist() == [float(u) for u in VECTORS[name]["u_first4"]]


def test_every_weight_has_the_recorded_shape_and_values():
    for key, check in WEIGHTS.items():
        if key != POSITION_IDS:
            assert_looks_like(weight(key, check["shape"]), check)


@pytest.mark.parametrize("variant", ["image", "temporal"])
def test_model_holds_exactly_the_official_tensors_and_their_formula_values(variant):
    held = {key: part for ours, tensor in model(variant).state_dict().items()
            for key, part in parts(ours, tensor).items()}
    wanted = golden("weights_check.json") if variant == "image" else WEIGHTS
    assert held.keys() == wanted.keys() - {POSITION_IDS}
    for key, part in held.items():
        assert_looks_like(part, wanted[key])


def test_stage1_model_has_as_many_tensors_as_the_official_one():
    held = [key for ours, tensor in model("stage1").state_dict().items() for key in parts(ours, tensor, stage1=True)]
    assert len(held) == golden("stage1/stage1.json")["n_state_tensors"] - 1      # less the position ids
    assert not any(".nets." in key for key in held)


@pytest.mark.parametrize("name", INPUTS)
def test_input_has_the_recorded_shape_and_values(name):
    assert_looks_like(given(name), INPUTS[name])


def test_inputs_are_bit_for_bit_the_recorded_ones():
    for name, tensor in golden("image/inputs.safetensors").items():
        assert torch.equal(given(name), tensor), name


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, float("nan")]), torch.ones(1, 2), torch.tensor([1.0, 1.1])],
                         ids=["nan", "shape", "value"])
def test_close_refuses_what_is_not_close(wrong):
    with pytest.raises(AssertionError):
        assert_close(wrong, torch.ones(2), tol=0.01)
