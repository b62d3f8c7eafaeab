"""Simulated street and room scans, readers of real ones, and their voxels. numpy only."""

from torchsparse.datasets.lidar import HDL32, HDL64, INDOOR, SENSORS, TOP64, Scan, Sensor, scan
from torchsparse.datasets.objects import (
    CLASSES,
    ROOM_CLASSES,
    STREET_CLASSES,
    SemanticClass,
    Solid,
)
from torchsparse.datasets.scenes import Ground, Scene, room, street
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
    # voxels
    "FEATURES",
    "Voxelized",
    "Voxels",
    "augment",
    "ground_level",
    "split",
    "voxelize",
]
