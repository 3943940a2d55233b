"""The backbones beside ViT, DeiT and Swin: one test class each, and what is special about one."""

from tests.test_modeling_common import SomeHighwayTesterMixin


class TestDinov2Highway(SomeHighwayTesterMixin):
    kind = "dinov2"


class TestDinov2WithRegistersHighway(SomeHighwayTesterMixin):
    kind = "dinov2_with_registers"


class TestSiglipHighway(SomeHighwayTesterMixin):
    kind = "siglip"


class TestCLIPHighway(SomeHighwayTesterMixin):
    kind = "clip"


class TestBeitHighway(SomeHighwayTesterMixin):
    kind = "beit"
