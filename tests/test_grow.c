/* Arrays that grow: what they hold stays, room doubles, a failure changes nothing. */
#include "kernels/grow.h"
#include "tests/scratch.h"

static void keeps_contents(void **state)
{
    (void)state;
    int *values = NULL;
    size_t cap = 0, moves = 0;
    for (int i = 0; i < 10000; i++) {
        size_t before = cap;
        test_ok(SRF_GROW(values, cap, i + 1));
        assert_true(cap > (size_t)i && cap >= before);
        moves += cap != before;
        values[i] = 3 * i;
    }
    assert_true(moves > 1 && moves <= 14); /* not at every element */
    for (int i = 0; i < 10000; i++) assert_int_equal(values[i], 3 * i);
    size_t before = cap;
    test_ok(SRF_GROW(values, cap, 100000)); /* more than twice as many */
    assert_true(before < 50000 && cap == 100000);
    test_ok(SRF_GROW(values, cap, 1));
    assert_int_equal(cap, 100000);
    assert_int_equal(values[9999], 3 * 9999);
    srf__free(values);
}

static void changes_nothing_at_failures(void **state)
{
    (void)state;
    int *values = NULL, *was;
    size_t cap = 0, before;
    test_ok(SRF_GROW(values, cap, 5));
    values[4] = 7;
    was = values, before = cap;
    srf__fail_alloc_after(0);
    srf_status st = SRF_GROW(values, cap, before + 1);
    srf__fail_alloc_after(-1);
    test_fails(st, SRF_NOMEM, "out of memory");
    test_fails(SRF_GROW(values, cap, SIZE_MAX / 2), SRF_NOMEM, "out of memory");
    assert_ptr_equal(values, was);
    assert_int_equal(cap, before);
    assert_int_equal(values[4], 7);
    srf__free(values);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_contents),
        cmocka_unit_test(changes_nothing_at_failures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
