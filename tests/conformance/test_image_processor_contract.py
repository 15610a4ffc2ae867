"""transformers' ImageProcessingTestMixin on our image processor."""

import unittest

import suite

from sim_hf.models.sim import SIMImageProcessor

common = suite.load("test_image_processing_common")


class SIMImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 32, "longest_edge": 64})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": SIMImageProcessor}

    def expected_output_image_shape(self, images):
        processor = SIMImageProcessor(size=self.size)
        sizes = []
        for image in images:
            height, width = (image.height, image.width) if hasattr(image, "height") else _height_and_width(image)
            sizes.append(processor.resized_size(height, width))
        padded = [-(-max(lengths) // processor.size_divisor) * processor.size_divisor for lengths in zip(*sizes, strict=True)]
        return self.num_channels, *padded


def _height_and_width(image):
    shape = tuple(image.shape)
    return shape[1:] if shape[0] in (1, 3, 4) else shape[:2]


class SIMImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = SIMImageProcessingTester
