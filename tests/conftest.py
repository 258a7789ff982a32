"The site, rendered once for all tests that look at it"
import copy
import pytest
from tests import site


@pytest.fixture(scope='session')
def pages(): return site.read_pages(site.ROOT/'nbs')


@pytest.fixture(scope='session')
def built(pages, tmp_path_factory):
    "Its folder, the report, what is wrong"
    out = tmp_path_factory.mktemp('site')/'site'
    return out, *site.build(out, copy.deepcopy(pages))
