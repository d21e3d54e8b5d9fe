from fedcmt.evaluation.tables import learning_line, results_table


def segmentation(dice: dict[str, float], cases: int = 2, sent: int = 1_500_000, received: int = 2_000_000) -> dict:
    test = {"cases": cases, "mean_dice": sum(dice.values()) / len(dice), "dice": dice, "iou": dice}
    return {"task": "segmentation", "bytes_sent": sent, "bytes_received": received, "test": test}


def with_other_scores(site: dict, iou: float, sensitivity: float | None, ppv: float, hd95: float) -> dict:
    scores = {"iou": iou, "sensitivity": sensitivity, "ppv": ppv, "specificity": 0.99, "hd95": hd95}
    labels = site["test"]["dice"]
    return {**site, "test": {**site["test"], **{score: dict.fromkeys(labels, v) for score, v in scores.items()}}}


CLASSIFICATION = {
    "task": "classification",
    "bytes_sent": 250_000,
    "bytes_received": 250_000,
    "test": {"cases": 10, "accuracy": 0.9, "balanced_accuracy": 0.85, "auc": None},
}


def test_equal_labels_share_a_table_with_their_mean_and_the_centralised_model() -> None:
    pooled = segmentation({"WT": 0.95, "ET": 0.85}, cases=5)["test"]
    results = {
        "job": "brats_sdl",
        "engine": "simulator",
        "seed": 0,
        "rounds": 3,
        "seconds": 12.34,
        "sites": {
            "client1": segmentation({"WT": 0.9, "ET": 0.7}),
            "client2": segmentation({"WT": 0.8, "ET": 0.6}, cases=3, sent=12_345_678),
        },
        "centralised": pooled,
    }
    assert results_table(results) == (
        "job brats_sdl, engine simulator, seed 0, rounds 3, 12.3 s\n"
        "\n"
        "site         cases      WT      ET  mean Dice  MB sent  MB received\n"
        "client1          2  0.9000  0.7000     0.8000     1.50         2.00\n"
        "client2          3  0.8000  0.6000     0.7000    12.35         2.00\n"
        "mean                0.8500  0.6500     0.7500\n"
        "centralised      5  0.9500  0.8500     0.9000\n"
    )


def test_each_label_set_and_task_has_its_table() -> None:
    results = {
        "sites": {
            "mr": segmentation({"WT": 0.9, "ET": 0.7}),
            "ct": segmentation({"liver": 0.5}),
            "cls": CLASSIFICATION,
        },
        "centralised": {"cases": 9, "accuracy": 1.0, "balanced_accuracy": 1.0, "auc": 1.0},
    }
    assert results_table(results) == (
        "site  cases      WT      ET  mean Dice  MB sent  MB received\n"
        "mr        2  0.9000  0.7000     0.8000     1.50         2.00\n"
        "\n"
        "site  cases   liver  mean Dice  MB sent  MB received\n"
        "ct        2  0.5000     0.5000     1.50         2.00\n"
        "\n"
        "site         cases  accuracy  balanced accuracy     AUC  MB sent  MB received\n"
        "cls             10    0.9000             0.8500       -     0.25         0.25\n"
        "centralised      9    1.0000             1.0000  1.0000\n"
    )


def test_sites_without_scores_show_dashes_and_stay_out_of_the_mean() -> None:
    sites = {
        "a": segmentation({"WT": 0.9}),
        "b": {**segmentation({"WT": 0.1}), "test": None},
        "c": {**segmentation({"WT": 0.1}), "test": {"cases": 0}},
        "d": segmentation({"WT": 0.7}),
    }
    assert results_table({"sites": sites}) == (
        "site       cases      WT  mean Dice  MB sent  MB received\n"
        "a              2  0.9000     0.9000     1.50         2.00\n"
        "b              -       -          -     1.50         2.00\n"
        "c              -       -          -     1.50         2.00\n"
        "d              2  0.7000     0.7000     1.50         2.00\n"
        "mean of 2         0.8000     0.8000\n"
    )


def test_no_scores_and_no_traffic() -> None:
    assert results_table({"sites": {"a": {"task": "segmentation", "test": None}}}) == (
        "site  cases  mean Dice\na         -          -\n"
    )


def test_centralised_model_of_other_labels_has_its_own_table() -> None:
    results = {"sites": {"a": segmentation({"WT": 0.9})}, "centralised": segmentation({"all": 0.5}, cases=4)["test"]}
    assert results_table(results).split("\n\n")[1] == (
        "site         cases     all  mean Dice\ncentralised      4  0.5000     0.5000\n"
    )


def test_participation_has_a_line_with_reasons() -> None:
    participation = {
        "client1": {"asked": 10, "took_part": 10, "absent": {}},
        "client2": {"asked": 10, "took_part": 8, "absent": {"3": "no answer within 20 s", "7": "DivergedError"}},
    }
    results = {"sites": {"client1": segmentation({"WT": 0.9})}, "participation": participation}
    (table, line) = results_table(results).split("\n\n")
    assert table.splitlines()[1].startswith("client1")
    assert line == (
        "Rounds taken part: client1 10/10, client2 8/10 (round 3: no answer within 20 s; round 7: DivergedError)\n"
    )


def test_many_absences_and_long_reasons_are_cut_and_a_site_without_results_is_named() -> None:
    absent = {str(number): "x" * 400 for number in range(2, 42)}
    results = {
        "sites": {"a": segmentation({"WT": 0.9})},
        "participation": {"b": {"asked": 50, "took_part": 10, "absent": absent}},
        "failed": {"b": "disk full"},
    }
    first, second = results_table(results).rstrip().split("\n\n")[1].split("\n")
    assert first.startswith("Rounds taken part: b 10/50 (round 2: " + "x" * 120 + "…; round 3: ")
    assert first.endswith("; 37 more)")
    assert "round 5" not in first
    assert second == "Without results: b (disk full)"


def test_the_line_of_learning_has_a_site_s_first_and_last_score() -> None:
    patches = {"score": "dice", "first": 0.05, "last": 0.87654}
    results = {"sites": {"a": {"validation_patches": patches}, "b": {}, "c": {"validation_patches": {"score": "dice"}}}}
    assert learning_line(results) == "a dice 0.0500 -> 0.8765"


def test_other_scores_have_a_table_of_their_own() -> None:
    one = with_other_scores(segmentation({"WT": 0.9, "ET": 0.7}), 0.7, 0.8, 0.9, 12.345)
    one["test"]["iou"] = {"WT": 0.8, "ET": 0.5}
    two = with_other_scores(segmentation({"WT": 0.8, "ET": 0.6}, cases=3), 0.6, None, 0.7, 374.0)
    two["test"]["sensitivity"] = {"WT": 0.5, "ET": None}
    sites = {"one": one, "two": two, "three": {**one, "test": None}, "cls": CLASSIFICATION}
    blocks = results_table({"sites": sites, "centralised": one["test"]}).split("\n\n")
    assert [block.split("\n")[0].split()[2] for block in blocks] == ["WT", "mean", "accuracy"]
    assert blocks[1] == (
        "site         cases  mean IoU  sensitivity     PPV  HD95 mm\n"
        "one              2    0.6500       0.8000  0.9000    12.35\n"
        "two              3    0.6000       0.5000  0.7000   374.00\n"
        "mean                  0.6250       0.6500  0.8000   193.17\n"
        "centralised      2    0.6500       0.8000  0.9000    12.35"
    )


def test_results_without_other_scores_beside_some_with_them_show_dashes() -> None:
    sites = {"old": segmentation({"WT": 0.9}), "new": with_other_scores(segmentation({"WT": 0.8}), 0.7, 0.8, 0.9, 5.0)}
    del sites["old"]["test"]["iou"]
    assert results_table({"sites": sites}).split("\n\n")[1] == (
        "site  cases  mean IoU  sensitivity     PPV  HD95 mm\n"
        "old       2         -            -       -        -\n"
        "new       2    0.7000       0.8000  0.9000     5.00\n"
        "mean           0.7000       0.8000  0.9000     5.00\n"
    )


def test_a_common_test_set_follows_in_its_own_block_without_traffic() -> None:
    common = with_other_scores(segmentation({"WT": 0.6}, cases=7), 0.5, 0.6, 0.7, 8.0)["test"]
    sites = {
        "a": {**segmentation({"WT": 0.9}), "common": common},
        "b": {**segmentation({"WT": 0.7}), "common": {**common, "mean_dice": 0.4, "dice": {"WT": 0.4}}},
        "c": {**segmentation({"WT": 0.5}), "common": None},
    }
    others = {"contribution": {"a": 1}, "cross_site": {}, "centralised": segmentation({"WT": 0.8})["test"]}
    own, title_and_dice, other_scores = results_table({"sites": sites, **others}).split("\n\n")
    assert own.splitlines()[-1].startswith("centralised")
    assert title_and_dice == (
        "Common test set\n"
        "site  cases      WT  mean Dice\n"
        "a         7  0.6000     0.6000\n"
        "b         7  0.4000     0.4000\n"
        "mean         0.5000     0.5000"
    )
    assert other_scores.splitlines()[1].split() == ["a", "7", "0.5000", "0.6000", "0.7000", "8.00"]


def test_a_common_test_set_of_classification() -> None:
    blocks = results_table({"sites": {"c": {**CLASSIFICATION, "common": CLASSIFICATION["test"]}}}).split("\n\n")
    assert (
        blocks[1]
        == "Common test set\n"
        + blocks[0].replace("  MB sent  MB received", "").replace("     0.25         0.25", "")
        + "\n"
    )
