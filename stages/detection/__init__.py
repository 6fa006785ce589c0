"""From scores to decisions: what is scored, on which scale, and from which threshold on it is OOD."""

from stages.detection.detector import Detector, ImageScores

__all__ = ["Detector", "ImageScores"]
