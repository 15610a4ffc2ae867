"""Data sets in other layouts and formats (COCO, YOLO, Pascal VOC, the Hub) as the COCO folder that everything else reads."""

from sim_hf.conversion.coco import CocoSource
from sim_hf.conversion.coco_folder import ConversionReport, ConvertedSplit, write_coco_folder
from sim_hf.conversion.hub import HubSource
from sim_hf.conversion.source import DetectionSource, SourceError, SourceImage, SourceObject
from sim_hf.conversion.voc import VocSource
from sim_hf.conversion.yolo import YoloSource

__all__ = [
    "CocoSource",
    "ConversionReport",
    "ConvertedSplit",
    "DetectionSource",
    "HubSource",
    "SourceError",
    "SourceImage",
    "SourceObject",
    "VocSource",
    "YoloSource",
    "write_coco_folder",
]
