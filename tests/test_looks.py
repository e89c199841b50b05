"""Whose scans are whose, by their names."""

from __future__ import annotations

import pytest

from nnunetv2_cmems.data.looks import new_patients_first, patients_of


@pytest.mark.parametrize(
    ("cases", "patients"),
    [
        (["patient001_frame01", "patient001_frame12", "patient002_frame01"], ["patient001", "patient001", "patient002"]),
        (["patient010_a", "patient011_a", "patient010_b"], ["patient010", "patient011", "patient010"]),
        (["case1_2", "case1_3", "case10_1"], ["case1", "case1", "case10"]),
        (["BraTS2021_00002", "BraTS2021_00003"], ["BraTS2021_00002", "BraTS2021_00003"]),
        (["1.2.840.113619.0", "1.2.840.113619.17"], ["1.2.840.113619.0", "1.2.840.113619.17"]),
        (["anna_left", "anna_right"], ["anna_left", "anna_right"]),
        (["patient001_frame01"], ["patient001_frame01"]),
        ([], []),
    ],
)
def test_patients_are_told_apart_by_the_first_number_in_which_names_differ(cases: list[str], patients: list[str]) -> None:
    assert patients_of(cases) == dict(zip(cases, patients, strict=True))


def test_further_scans_of_a_patient_come_later() -> None:
    ranked = ["A2021_1_a", "A2021_1_b", "A2021_2_a", "A2021_3_a"]
    assert new_patients_first(ranked, str) == ["A2021_1_a", "A2021_2_a", "A2021_3_a", "A2021_1_b"]
    assert new_patients_first(ranked[1:], str, ranked[:1]) == ["A2021_2_a", "A2021_3_a", "A2021_1_b"]
