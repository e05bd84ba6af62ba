import threading

import pytest

from kvjax.engine.request import QueueFullError
from kvjax.engine.scheduling.admission import Admission


def test_places_are_counted_and_given_back():
    admission = Admission(3)
    with admission.reserve(2):
        with pytest.raises(QueueFullError, match="2 of 3 places are taken, 2 more are asked for; try again later"):
            admission.reserve(2)
        with admission.reserve(1), pytest.raises(QueueFullError):
            admission.reserve(1)
    admission.check_integrity()
    with admission.reserve(3):
        pass
    admission.check_integrity()


def test_a_place_in_use_outlives_the_reservation():
    admission = Admission(2)
    with admission.reserve(2) as reservation:
        use = reservation.use()
        use.__enter__()
    with pytest.raises(AssertionError, match="1 places are still taken"):
        admission.check_integrity()
    assert not admission.wait_empty(0.0)
    use.__exit__(None, None, None)
    admission.check_integrity()
    assert admission.wait_empty(0.0)


def test_a_failure_gives_its_place_back():
    admission = Admission(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.reserve(1) as reservation, reservation.use():
            _ = 1 / 0
    admission.check_integrity()


def test_no_more_uses_than_places():
    admission = Admission(5)
    with admission.reserve(1) as reservation:
        with reservation.use():
            pass
        with pytest.raises(QueueFullError, match="no place left: reserve one for each"), reservation.use():
            pass
    with pytest.raises(QueueFullError, match="no place left"), reservation.use():
        pass
    admission.check_integrity()


def test_after_closing_nobody_comes_but_those_inside_go_on():
    admission = Admission(2)
    with admission.reserve(1) as reservation:
        admission.close()
        with pytest.raises(QueueFullError, match="shutting down"):
            admission.reserve(1)
        with reservation.use():
            pass
    admission.check_integrity()


def test_threads_do_not_lose_places():
    admission, refused = Admission(3), []

    def come_and_go():
        for _ in range(300):
            try:
                with admission.reserve(2) as reservation, reservation.use():
                    assert admission._taken <= 3
            except QueueFullError:
                refused.append(1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    admission.check_integrity()
