"""Simulated street and room scans, readers of real ones, and their voxels. numpy only."""

from torchsparse.datasets.lidar import HDL32, HDL64, INDOOR, SENSORS, TOP64, Scan, Sensor, scan
from torchsparse.datasets.objects import (
    CLASSES,
    ROOM_CLASSES,
    STREET_CLASSES,
    SemanticClass,
    Solid,
)
from torchsparse.datasets.readers import FORMATS, Format, FormatError, PointCloud, read_points
from torchsparse.datasets.rooms import room
from torchsparse.datasets.scenes import Ground, Scene, street
from torchsparse.datasets.voxelized import (
    FEATURES,
    Voxelized,
    Voxels,
    augment,
    ground_level,
    split,
    voxelize,
)

__all__ = [
    # scenes
    "CLASSES",
    "ROOM_CLASSES",
    "STREET_CLASSES",
    "Ground",
    "Scene",
    "SemanticClass",
    "Solid",
    "room",
    "street",
    # sensors
    "HDL32",
    "HDL64",
    "INDOOR",
    "SENSORS",
    "TOP64",
    "Scan",
    "Sensor",
    "scan",
    # files
    "FORMATS",
    "Format",
    "FormatError",
    "PointCloud",
    "read_points",
    # voxels
    "FEATURES",
    "Voxelized",
    "Voxels",
    "augment",
    "ground_level",
    "split",
    "voxelize",
]
