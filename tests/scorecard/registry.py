"""All 36 faults in order."""

from __future__ import annotations

import faults_of_data
import faults_of_hub_and_space
import faults_of_training

FAULTS = tuple(
    sorted(
        faults_of_training.FAULTS + faults_of_data.FAULTS + faults_of_hub_and_space.FAULTS,
        key=lambda fault: fault.number,
    )
)
