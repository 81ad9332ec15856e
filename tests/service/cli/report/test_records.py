"""Records survive an interruption, and are dropped when they were made otherwise."""

from service.cli.report.records import Record, RecordFile

SETTING = {"model": "tiny@1", "methods": ["gradcam"]}


def test_records_are_read_again(tmp_path):
    path = tmp_path / "r.jsonl"
    first = RecordFile(path, SETTING)
    first.add(Record(path="a", class_id=1, predicted=1, values=[[0.5]]))
    first.add(Record(path="b", class_id=1, error="unreadable"))
    again = RecordFile(path, SETTING)
    assert again.records == {"a": first.records["a"]}, "a failed image is tried again"


def test_a_line_cut_by_an_interruption_is_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, SETTING)
    file.add(Record(path="a", class_id=1))
    with path.open("a") as stream:
        stream.write('{"path": "b", "cla')
    again = RecordFile(path, SETTING)
    assert set(again.records) == {"a"}
    again.add(Record(path="c", class_id=1))
    assert set(RecordFile(path, SETTING).records) == {"a", "c"}


def test_another_setting_begins_anew(tmp_path):
    path = tmp_path / "r.jsonl"
    RecordFile(path, SETTING).add(Record(path="a", class_id=1))
    assert RecordFile(path, {**SETTING, "methods": ["layercam"]}).records == {}
