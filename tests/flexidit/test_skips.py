from flexidit.skips import SkipReport


def test_summary_names_the_first_and_counts_the_rest():
    report = SkipReport()
    for number in range(4):
        report.add(f"{number}.jpg", "zero bytes")
    assert report.summary("image", limit=2) == "4 images skipped: 0.jpg (zero bytes), 1.jpg (zero bytes), and 2 more"
    assert report.by_reason() == {"zero bytes": 4}


def test_empty_report_says_so():
    assert SkipReport().summary("shard") == "0 shards skipped"
