from fedcmt.evaluation.tables import learning_line, results_table


def segmentation(dice: dict[str, float], cases: int = 2, sent: int = 1_500_000, received: int = 2_000_000) -> dict:
    test = {"cases": cases, "mean_dice": sum(dice.values()) / len(dice), "dice": dice, "iou": dice}
    return {"task": "segmentation", "bytes_sent": sent, "bytes_received": received, "test": test}


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


def test_the_line_of_learning_has_a_site_s_first_and_last_score() -> None:
    patches = {"score": "dice", "first": 0.05, "last": 0.87654}
    results = {"sites": {"a": {"validation_patches": patches}, "b": {}, "c": {"validation_patches": {"score": "dice"}}}}
    assert learning_line(results) == "a dice 0.0500 -> 0.8765"
